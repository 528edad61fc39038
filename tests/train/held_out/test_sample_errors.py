"""Files with the errors of each validation sample."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.held_out.sample_errors import (
    WEIGHTS,
    Facts,
    SampleError,
    find_bins,
    get_file,
    list_files,
    name_bin,
    read_sample_errors,
    write_sample_errors,
)

FIRST = SampleError("a", Size(64, 32), 0, 0, 999.0, -np.inf, 0.5, 2.0, np.nan, 0.25)
SECOND = SampleError("b", Size(32, 64), 1, 1, 250.5, 1.5, 0.75, 3.0, 0.125, 0.5)


def build_facts(step: int) -> Facts:
    return Facts(step=step, samples_seen=4 * step, seed=7, timesteps_per_sample=2, prediction="v")


def test_errors_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_sample_errors(tmp_path, {WEIGHTS: [FIRST, SECOND], "0.5": [SECOND]}, build_facts(3))
    facts, columns = read_sample_errors(get_file(tmp_path, 3))
    assert facts == build_facts(3)
    assert columns["average"].tolist() == [WEIGHTS, WEIGHTS, "0.5"] and columns["key"].tolist() == ["a", "b", "b"]
    assert columns["bucket_width"].tolist() == [64, 32, 32] and columns["bucket_height"].tolist() == [32, 64, 64]
    assert columns["log_snr_bin"].tolist() == [0, 4, 4] and columns["log_snr"][0] == -np.inf
    assert np.isnan(columns["x0_error"][0]) and columns["x0_error"][1:].tolist() == [0.125, 0.125]
    assert columns["v_error"].tolist() == [0.25, 0.5, 0.5] and columns["loss"].tolist() == [2, 3, 3]
    assert columns["timestep"].tolist() == [999, 250.5, 250.5] and columns["turn"].tolist() == [0, 1, 1]
    assert not [path for path in get_file(tmp_path, 3).parent.iterdir() if path.suffix != ".parquet"]


def test_files_of_steps_that_a_resume_repeats_are_dropped(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        write_sample_errors(tmp_path, {WEIGHTS: [FIRST]}, build_facts(step))
    write_sample_errors(tmp_path, {WEIGHTS: [SECOND]}, build_facts(4))
    assert list(list_files(tmp_path)) == [2, 4]
    assert read_sample_errors(get_file(tmp_path, 4)).columns["key"].tolist() == ["b"]


def test_bins_of_the_signal_to_noise_ratio() -> None:
    assert find_bins(np.array([-np.inf, -6.1, -6, 0, 5.9, 6, np.inf])).tolist() == [0, 0, 1, 4, 6, 7, 7]
    assert [name_bin(number) for number in (0, 1, 4, 7)] == ["< -6", "-6 … -4", "0 … 2", "≥ 6"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "step-00000001.parquet"
    for content in (b"", b"PAR1 no", b"x" * 100):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"step-00000001.parquet holds no validation errors"):
            read_sample_errors(file)
    pq.write_table(pa.table({"key": ["a"]}), file)
    with pytest.raises(ValueError, match=r"step-00000001.parquet holds no validation errors"):
        read_sample_errors(file)
