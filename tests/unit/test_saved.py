import subprocess
import sys

import pytest

from kvtuner_gguf.calibrate.saved import claimed
from kvtuner_gguf.errors import CalibrationError

CLAIM = "import sys; from pathlib import Path; from kvtuner_gguf.calibrate.saved import claimed\nwith claimed(Path(sys.argv[1])): print('claimed')"


def test_a_folder_in_use_is_refused_by_its_name_and_left_alone(tmp_path):
    work = tmp_path / "records"
    work.mkdir()
    (work / "text.npz").write_bytes(b"kept")
    with claimed(work), pytest.raises(CalibrationError, match=str(work)):
        with claimed(work):
            pytest.fail("claimed twice")
    assert (work / "text.npz").read_bytes() == b"kept"


def test_another_process_is_refused_and_may_go_on_afterwards(tmp_path):
    command = [sys.executable, "-c", CLAIM, str(tmp_path / "records")]
    with claimed(tmp_path / "records"):
        refused = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode and "is in use" in refused.stderr
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout == "claimed\n"


def test_a_claim_ends_with_an_error_inside_it(tmp_path):
    with pytest.raises(ValueError), claimed(tmp_path / "records"):
        raise ValueError
    with claimed(tmp_path / "records"):
        pass
