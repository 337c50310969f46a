"""The versions of diffrax that the adjoints are for."""

import pytest

from flatlayers.adjoints import _diffrax


def test_other_versions_of_diffrax_are_named():
    for version in ("0.7.2", "0.7.3", "0.7.10.dev0"):
        _diffrax.check_version(version)
    for version in ("0.7.1", "0.6.0", "0.8.0", "1.0"):
        with pytest.raises(ImportError, match=rf"diffrax >= 0.7.2 and < 0.8.* found {version}"):
            _diffrax.check_version(version)
