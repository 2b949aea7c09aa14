import sys

import pytest

from fedmeta.data import load
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data


@pytest.mark.parametrize("package", ["datasets", "flwr_datasets"])
def test_without_the_extra_one_line_reports_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fedmeta.data.huggingface", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(FedmetaError, match=r'needs a package \(.*\): pip install "fedmeta\[huggingface\]"$'):
        load(Data(source="huggingface", path="somebody/something"))
