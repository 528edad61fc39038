"""Checkpoints on disk: sealed once all parts are there, verified byte by byte, pruned, and written to a full disk."""

import shutil
import sys
import time
from pathlib import Path

import orjson
import pytest
import torch
from disk_calls import DiskCalls
from loguru import logger

from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.train.checkpoint import folder as checkpoints
from sdxl_trainer.train.checkpoint import writer as checkpoint_writer
from sdxl_trainer.train.checkpoint.resume import choose_checkpoint
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter, count_tensor_bytes, estimate_bytes


def write_rank(folder: Path, rank: int, step: int, world_size: int = 2, token: str = "t", **state: int) -> Path:
    writer = CheckpointWriter(folder=folder, rank=rank, world_size=world_size, token=token, keep_last=2)
    files = {f"state/rank_{rank}.pt": {"weights": torch.full((5, 3), float(rank)), "step": step}}
    return writer.write_shard(files, TrainState(step=step, epoch=1, index=2, world_size=world_size, **state))


def make_checkpoint(folder: Path, step: int, **state: int) -> Path:
    for rank in range(2):
        partial = write_rank(folder, rank, step, **state)
    sealed = checkpoints.seal_checkpoint(partial)
    assert sealed is not None
    return sealed


def test_sealed_only_when_every_rank_is_there(tmp_path: Path) -> None:
    partial = write_rank(tmp_path, 0, 7)
    assert checkpoints.seal_checkpoint(partial) is None
    assert checkpoints.find_newest_checkpoint(tmp_path) is None
    write_rank(tmp_path, 1, 7)
    sealed = checkpoints.seal_checkpoint(partial)
    assert sealed == tmp_path / "step-00000007" == checkpoints.find_newest_checkpoint(tmp_path)
    assert not partial.exists() and not (sealed / "parts").exists()
    assert TrainState.load(sealed) == TrainState(step=7, epoch=1, index=2, world_size=2)
    loaded = torch.load(sealed / "state" / "rank_1.pt", weights_only=True)
    assert loaded["step"] == 7 and torch.equal(loaded["weights"], torch.ones(5, 3))
    files = orjson.loads((sealed / "manifest.json").read_bytes())["files"]
    assert sorted(files) == ["state/rank_0.pt", "state/rank_1.pt", "trainer_state.json"]


def test_a_checkpoint_is_on_disk_before_older_ones_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = DiskCalls(monkeypatch)
    for step in (1, 2, 3):
        partial = write_rank(tmp_path, 0, step, world_size=1)
        # The rank's part is renamed last, so all before it is on disk.
        assert {str(partial), str(partial / "state"), str(partial / "state" / "rank_0.pt")} <= calls._durable
        assert checkpoints.seal_checkpoint(partial) is not None
        checkpoints.prune_checkpoints(tmp_path, 2, 0)
    assert calls.faults == [] and calls.num_renames == 12 and calls.num_deletions > 3


def test_a_start_seals_complete_folders_and_deletes_the_others(tmp_path: Path) -> None:
    for rank in range(2):
        write_rank(tmp_path, rank, 4, token="whole")
    half = write_rank(tmp_path, 1, 6, token="half")
    empty = tmp_path / ".step-00000008.x.partial"
    empty.mkdir()
    checkpoints.recover_partial_checkpoints(tmp_path)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["step-00000004"]
    assert not half.exists() and not empty.exists()


def test_any_wrong_byte_is_found_and_the_previous_checkpoint_is_used(tmp_path: Path) -> None:
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    for name in ("state/rank_0.pt", "state/rank_1.pt", "trainer_state.json", "manifest.json"):
        path = second / name
        content = path.read_bytes()
        for place in {0, len(content) // 3, len(content) // 2, len(content) - 1}:
            flipped = bytearray(content)
            flipped[place] ^= 0x10
            path.write_bytes(flipped)
            found = checkpoints.find_newest_checkpoint(tmp_path)
            # A flipped bit in white space leaves the content of the manifest unchanged.
            harmless = name == "manifest.json" and found == second and _same_json(flipped, content)
            assert found == first or harmless, f"{name}, byte {place}"
        path.write_bytes(content[:-1])
        assert checkpoints.find_newest_checkpoint(tmp_path) == first
        problem = checkpoints.verify_manifest(second)
        assert name == "manifest.json" or problem == f"{name} has {len(content) - 1} bytes instead of {len(content)}"
        path.unlink()
        assert checkpoints.find_newest_checkpoint(tmp_path) == first
        path.write_bytes(content)
        assert checkpoints.find_newest_checkpoint(tmp_path) == second


def test_a_manifest_must_list_the_state(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 1)
    (folder / "manifest.json").write_bytes(b'{"files": {}}')
    assert checkpoints.verify_manifest(folder) == "manifest.json does not list trainer_state.json"
    assert checkpoints.find_newest_checkpoint(tmp_path) is None


def test_a_seal_that_was_cut_short_is_completed_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is killed between manifest and rename, with an older checkpoint of the same step in the folder."""
    make_checkpoint(tmp_path, 7)
    for rank in range(2):
        partial = write_rank(tmp_path, rank, 7, token="again")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "replace_file", lambda *_: sys.exit("killed"))
        patch.setattr(checkpoints, "write_atomic", lambda path, content: path.write_bytes(content))
        with pytest.raises(SystemExit):
            checkpoints.seal_checkpoint(partial)
    assert checkpoints.find_newest_checkpoint(tmp_path) is None
    checkpoints.recover_partial_checkpoints(tmp_path)
    assert checkpoints.find_newest_checkpoint(tmp_path) == tmp_path / "step-00000007"


def test_a_damaged_checkpoint_is_not_kept_in_the_place_of_an_intact_one(tmp_path: Path) -> None:
    """After falling back to step 4, the checkpoint of step 6 must outlive the damaged one of step 8."""
    make_checkpoint(tmp_path, 4)
    (make_checkpoint(tmp_path, 8) / "state" / "rank_0.pt").write_bytes(b"damaged")
    (tmp_path / "step-00000003" / "state").mkdir(parents=True)  # its deletion was cut short
    (tmp_path / "step-00000009" / "state").mkdir(parents=True)  # somebody deleted its manifest
    assert choose_checkpoint(tmp_path) == tmp_path / "step-00000004"
    make_checkpoint(tmp_path, 6)
    checkpoints.prune_checkpoints(tmp_path, keep_last=1, keep_every_steps=0)
    assert checkpoints.find_newest_checkpoint(tmp_path) == tmp_path / "step-00000006"
    left = ["damaged-step-00000008", "damaged-step-00000009", "step-00000006"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(tmp_path: Path) -> None:
    assert choose_checkpoint(tmp_path) is None
    (make_checkpoint(tmp_path, 4) / "manifest.json").unlink()
    (make_checkpoint(tmp_path, 8) / "state" / "rank_0.pt").unlink()
    for _ in range(2):
        with pytest.raises(UserInputError) as error:
            choose_checkpoint(tmp_path)
        for part in ("step-00000008: state/rank_0.pt is missing", "step-00000004: manifest.json", "delete this folder"):
            assert part in str(error.value)
    for name in ("step-00000004", "step-00000008"):
        (tmp_path / name).rename(tmp_path / f"damaged-{name}")
    with pytest.raises(UserInputError, match="damaged-step-00000004: was damaged at an earlier start"):
        choose_checkpoint(tmp_path)


def test_the_oldest_are_deleted_except_milestones(tmp_path: Path) -> None:
    for step in (2, 4, 5, 6, 8, 9):
        make_checkpoint(tmp_path, step)
    checkpoints.prune_checkpoints(tmp_path, keep_last=2, keep_every_steps=4)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == [f"step-{step:08d}" for step in (4, 8, 9)]
    assert not (tmp_path / "step-00000002").exists()


@pytest.mark.parametrize(
    ("num_until_update", "kept"),
    [(16, (14, 16)), (15, (14, 16)), (13, (12, 14, 16)), (9, (8, 14, 16)), (4, (14, 16)), (0, (14, 16))],
)
def test_a_checkpoint_of_before_the_last_update_is_kept(
    tmp_path: Path, num_until_update: int, kept: tuple[int, ...]
) -> None:
    """The last update of the newest checkpoint may have broken the weights of all checkpoints after it."""
    for step in (4, 8, 12, 14, 16):
        make_checkpoint(tmp_path, step, num_until_update=min(step, num_until_update))
    checkpoints.prune_checkpoints(tmp_path, keep_last=2, keep_every_steps=0)
    assert [checkpoints.get_step(path) for path in checkpoints.list_checkpoints(tmp_path)] == list(kept)


def test_a_lack_of_space_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(folder=tmp_path / "c", rank=1, world_size=4, token="t", keep_last=1)
    files = {"state/pp_rank_0": {"a": [torch.zeros(1000), (torch.zeros(500, dtype=torch.bfloat16),)]}}
    assert count_tensor_bytes(files) == 5000
    assert estimate_bytes({**files, "state/module": torch.zeros(10)}, world_size=4) == 4 * 5000 + 40
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    writer.start_writing(files, TrainState())
    with pytest.raises(OSError, match=r"needs about .* bytes, 20,000 are free"):
        writer.wait()
    assert list((tmp_path / "c").iterdir()) == []


def test_a_checkpoint_waits_for_space_and_keeps_the_previous_one(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up during a save: the partial files are deleted, and written again once there is space."""
    monkeypatch.setattr(checkpoint_writer, "SPACE_POLL_SECONDS", 0.02)
    monkeypatch.setattr(checkpoint_writer, "SPARE_BYTES", 0)
    usage = shutil.disk_usage(small_disk)
    # The disk looks empty before the save and fills up during it.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 40))
    folder = small_disk / "c"
    writer = CheckpointWriter(folder=folder, rank=0, world_size=1, token="t", keep_last=1, wait_for_space_seconds=60)
    small, large = torch.zeros(20_000), torch.ones(200_000)
    writer.start_writing({"state/x.pt": small}, TrainState(step=1, world_size=1))
    writer.wait()
    messages: list[str] = []
    sink = logger.add(lambda line: messages.append(str(line)), format="{message}")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(300_000))
    writer.start_writing({"state/x.pt": large}, TrainState(step=2, world_size=1))
    deadline = time.monotonic() + 30
    while not messages:
        assert time.monotonic() < deadline, "no warning about the full disk"
        time.sleep(0.01)
    assert "No space left on device" in messages[0] and "step 2 waits" in messages[0]
    assert checkpoints.find_newest_checkpoint(folder) == folder / "step-00000001", "the previous checkpoint is gone"
    ballast.unlink()
    writer.wait()
    logger.remove(sink)
    assert [path.name for path in checkpoints.list_checkpoints(folder)] == ["step-00000002"]
    assert checkpoints.find_newest_checkpoint(folder) and torch.equal(
        torch.load(folder / "step-00000002/state/x.pt"), large
    )
    ballast.write_bytes(bytes(100_000))
    writer.wait_for_space_seconds = 0.1
    writer.start_writing({"state/x.pt": large}, TrainState(step=3, world_size=1))
    with pytest.raises(OSError, match="No space left on device"):
        writer.wait()
    assert checkpoints.find_newest_checkpoint(folder) == folder / "step-00000002"
    assert list(folder.glob(".step-00000003.*/state/*")) == [], "partial files are left"


class DeletesFiles:
    """Content of a checkpoint that deletes a path while it is written, the first time."""

    def __init__(self, path: Path):
        self.paths = [path]

    def __reduce__(self) -> tuple:
        if self.paths:
            path = self.paths.pop()
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return (int, ())


@pytest.mark.parametrize("deleted", ["state/a.pt", "."])
def test_files_that_are_deleted_while_a_checkpoint_is_written_are_written_again(tmp_path: Path, deleted: str) -> None:
    writer = CheckpointWriter(folder=tmp_path, rank=0, world_size=1, token="t", keep_last=1)
    partial = checkpoints.get_partial_folder(tmp_path, 2, "t")
    weights = torch.ones(3)
    writer.start_writing({"state/a.pt": weights, "b.pt": DeletesFiles(partial / deleted)}, TrainState(2, world_size=1))
    writer.wait()
    newest = checkpoints.find_newest_checkpoint(tmp_path)
    assert newest and torch.equal(torch.load(newest / "state" / "a.pt"), weights) and not writer.take_repeat()


@pytest.mark.parametrize("deleted", ["rank_0.pt", "cut", "folder"])
def test_a_checkpoint_is_announced_and_older_ones_are_deleted_only_if_it_is_whole(tmp_path: Path, deleted: str) -> None:
    """Files are deleted while rank 0 waits for the part of rank 1."""
    before = make_checkpoint(tmp_path, 1)
    writer = CheckpointWriter(folder=tmp_path, rank=0, world_size=2, token="t", keep_last=1)
    writer.start_writing({"state/rank_0.pt": torch.ones(3)}, TrainState(step=2, world_size=2))
    partial = checkpoints.get_partial_folder(tmp_path, 2, "t")
    deadline = time.monotonic() + 30
    while not checkpoints.get_part_file(partial, 0).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if deleted == "folder":
        shutil.rmtree(partial.rename(tmp_path / "moved"))  # at once: the writer deletes it, too
    else:
        file = partial / "state" / "rank_0.pt"
        file.write_bytes(file.read_bytes()[:-1]) if deleted == "cut" else file.unlink()
        write_rank(tmp_path, 1, 2)
    writer.wait()
    assert writer.take_repeat() and not writer.take_repeat() and writer.last_step == -1
    assert sorted(tmp_path.iterdir()) == [before] and checkpoints.verify_manifest(before) is None


def test_a_checkpoint_that_is_not_whole_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)
    (tmp_path / "step-00000002" / "state" / "rank_1.pt").unlink()
    (tmp_path / "step-notes").mkdir()
    checkpoints.prune_checkpoints(tmp_path, keep_last=2, keep_every_steps=0)
    assert checkpoints.verify_manifest(tmp_path / "step-00000001") is None


def test_an_error_in_the_background_reaches_the_next_wait(tmp_path: Path) -> None:
    writer = CheckpointWriter(folder=tmp_path / "c", rank=0, world_size=1, token="t", keep_last=1)
    writer.start_writing({"a/b": 1}, TrainState(step=1, world_size=1))
    writer.wait()
    (tmp_path / "c" / ".step-00000002.t.partial").write_text("in the way")
    writer.start_writing({"a/b": 1}, TrainState(step=2, world_size=1))
    with pytest.raises(OSError):
        writer.wait()
    writer.wait()
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "c")] == ["step-00000001"]


def _same_json(left: bytes | bytearray, right: bytes) -> bool:
    try:
        return orjson.loads(bytes(left)) == orjson.loads(right)
    except ValueError:
        return False
