"""A checkpoint is whole or absent, damage is never loaded, and nothing that was saved gets lost."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from crash import crash_states, final_tree, read_tree, record
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicbert_ds.config import load_recipe
from mosaicbert_ds.errors import CheckpointError
from mosaicbert_ds.training import checkpoint as disk
from mosaicbert_ds.training.checkpoint import (
    BackgroundWriter,
    newest_verified,
    open_verified,
    prune,
    write_step,
)
from mosaicbert_ds.training.saving import check_fits, choose_checkpoint
from mosaicbert_ds.typed_yaml import to_tree

Tensors = dict[str, dict[str, torch.Tensor]]
FILES = (
    "exp_avg.safetensors",
    "exp_avg_sq.safetensors",
    "manifest.json",
    "state.json",
    "weights.safetensors",
)


def tensors_of(step: int, numbers: int = 24) -> Tensors:
    """Different for each step and kind."""
    generator = torch.Generator().manual_seed(step)
    return {
        kind: {
            "a.weight": torch.randn(numbers, generator=generator),
            "b": torch.randn(2, 3, generator=generator),
        }
        for kind in disk.KINDS
    }


def save(root: Path, step: int, kept: bool = False, numbers: int = 24) -> Path:
    return write_step(root, step, tensors_of(step, numbers), {"progress": {"step": step}, "kept": kept})


def assert_holds(found: disk.Checkpoint, step: int, numbers: int = 24) -> None:
    """`found` is `step`, bit for bit."""
    assert found.path.name == f"step-{step:08d}"
    assert found.state["progress"] == {"step": step}
    for kind, named in tensors_of(step, numbers).items():
        with found.open(kind) as file:
            assert set(file.keys()) == set(named)
            for name, tensor in named.items():
                assert torch.equal(file.get_tensor(name).view(torch.int32), tensor.view(torch.int32))


def steps_in(root: Path) -> list[int]:
    return sorted(disk.step_number(path) for path in disk.saved_steps(root))


# -- format


@settings(max_examples=60, deadline=None, database=None)
@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable() and name != "__metadata__"),
        st.lists(st.integers(0, 5), max_size=4),
        max_size=5,
    ),
    seed=st.integers(0, 1000),
)
def test_every_bit_comes_back_and_safetensors_reads_it(
    shapes: dict[str, list[int]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any bit pattern: NaNs with their payload, infinities, -0.0, subnormals; scalars and empty tensors."""
    root, generator = tmp_path_factory.mktemp("run"), torch.Generator().manual_seed(seed)
    named = {
        name: torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32).view(torch.float32)
        for name, shape in shapes.items()
    }
    tensors = {kind: named for kind in disk.KINDS}
    state = {"progress": {"step": 7}, "kept": True, "text": "naïve \u2028 \U0001f600", "number": 0.1}
    step = write_step(root, 7, tensors, state)
    found, complaints = newest_verified(root)
    assert found is not None and found.path == step and not complaints
    assert found.state == state
    for kind in disk.KINDS:
        read = safetensors.torch.load_file(step / f"{kind}.safetensors")
        assert {name: list(tensor.shape) for name, tensor in read.items()} == shapes
        for name, tensor in named.items():
            assert torch.equal(read[name].view(torch.int32), tensor.view(torch.int32))


def test_a_view_of_another_tensor_is_saved_as_what_it_shows(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    views = {"transposed": base.T, "column": base[:, 1], "row": base[2]}
    step = write_step(tmp_path, 1, {kind: views for kind in disk.KINDS}, {"progress": {"step": 1}})
    read = safetensors.torch.load_file(step / "weights.safetensors")
    assert all(torch.equal(read[name], view) for name, view in views.items())


def test_a_folder_without_checkpoints_is_a_fresh_start(tmp_path: Path) -> None:
    assert newest_verified(tmp_path / "none") == (None, [])
    (tmp_path / "latest").write_text("step-00000003\n")  # a hint, never believed
    for name in ("step-x", "step-\u00b2", "step-00000001.tmp", "step-00000001.old", "step-"):
        (tmp_path / name).mkdir()
    assert newest_verified(tmp_path) == (None, [])


# -- power cuts


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of little trees are written and read."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path) as folder:
        yield Path(folder)


def _save_eight_steps(root: Path, mark: Callable[[int], None]) -> None:
    for step in range(1, 9):
        save(root, step, kept=step in (1, 5))
        mark(step)
        prune(root, step, keep_last=2)


def _lost(trace: Any, folder: Path, per_prefix: int) -> tuple[int, list[str]]:
    """Number of distinct crash states of `trace`, and what goes wrong in them."""
    seen, faults = set(), []
    for state in crash_states(trace, random.Random(0), per_prefix):
        key = hashlib.sha256(repr((state.tree, state.marks[-1:])).encode()).digest()
        if key in seen:
            continue
        seen.add(key)
        shutil.rmtree(folder, ignore_errors=True)
        state.write(folder)
        # The newest that was promised; or the one in the making, if all of it is there.
        promised = max(state.marks, default=0)
        try:
            found, _ = newest_verified(folder / "checkpoints")
            step = found.state["progress"]["step"] if found else 0
            if step not in (promised, promised + 1):
                faults.append(f"{step} instead of {promised}")
            elif found:
                assert_holds(found, step)
        except Exception as error:
            faults.append(f"{type(error).__name__} instead of {promised}: {error}")
    return len(seen), faults


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = tmp_path_factory.mktemp("traced")
    with record(run) as trace:
        _save_eight_steps(run / "checkpoints", trace.mark)
    assert final_tree(trace) == read_tree(run), "the trace has every operation"
    assert steps_in(run / "checkpoints") == [1, 5, 7, 8]
    return trace


def test_after_a_power_cut_at_any_moment_the_newest_saved_step_is_found(trace: Any, memory: Path) -> None:
    count, faults = _lost(trace, memory / "disk", per_prefix=60)
    assert count >= 2000
    assert faults == []


def test_the_crash_states_find_a_protocol_that_does_not_sync(trace: Any, memory: Path) -> None:
    """The test above can fail: without the fsyncs of files, or of folders, steps get lost in it."""
    synced = list(trace.operations)
    folders = {operation[1] for operation in synced if operation[0] == "mkdir"} | {()}
    try:
        for of_folders in (False, True):
            trace.operations[:] = [
                operation
                for operation in synced
                if operation[0] != "fsync" or (operation[1] in folders) != of_folders
            ]
            assert _lost(trace, memory / "disk", per_prefix=2)[1], f"fsync of folders: {not of_folders}"
    finally:
        trace.operations[:] = synced


def test_a_power_cut_while_a_damaged_step_is_replaced_loses_nothing(tmp_path: Path, memory: Path) -> None:
    run = tmp_path / "run"
    for step in (1, 2, 3):
        save(run / "checkpoints", step)
    file = run / "checkpoints" / "step-00000003" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with record(run) as trace:
        trace.mark(2)
        save(run / "checkpoints", 3)
        trace.mark(3)
        prune(run / "checkpoints", 3, keep_last=2)
    assert final_tree(trace) == read_tree(run)
    count, faults = _lost(trace, memory / "disk", per_prefix=60)
    assert count >= 250
    assert faults == []


# -- kills

KILLS = 40


def _save_for_ever(root: Path, saved: Any) -> None:
    for step in range(saved.value + 1, 1 << 30):
        save(root, step, kept=step % 10 == 0)
        saved.value = step
        prune(root, step, keep_last=2)


def test_a_killed_process_never_loses_what_it_saved(tmp_path: Path) -> None:
    rng, context, saved_before = random.Random(0), multiprocessing.get_context("fork"), 0
    saved = context.RawValue("q", 0)  # without a lock, which a killed process would keep
    for _ in range(KILLS):
        process = context.Process(target=_save_for_ever, args=(tmp_path, saved), daemon=True)
        process.start()
        while saved.value == saved_before:  # it is at work
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))  # a save and its removals take about 5 ms
        process.kill()
        process.join()
        found, complaints = newest_verified(tmp_path)
        assert complaints == []
        assert found is not None
        step = found.state["progress"]["step"]
        assert step in (saved.value, saved.value + 1)
        assert_holds(found, step)
        saved.value = saved_before = step  # the next one goes on from there
    prune(tmp_path, saved.value, keep_last=2)
    assert [path.name for path in tmp_path.iterdir() if path.suffix] in ([], ["latest.tmp"])
    assert len(steps_in(tmp_path)) <= saved.value // 10 + 2


# -- damage

PAGES = 3 * 4096 // 4  # fp32 numbers in three pages


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Path]:
    """A run with steps 1, 2 and 3 of several pages."""
    for step in (1, 2, 3):
        save(tmp_path, step, numbers=PAGES)
    yield tmp_path
    found, complaints = newest_verified(tmp_path)  # the tests put back what they damage
    assert found is not None and complaints == []
    assert_holds(found, 3, PAGES)


def assert_falls_back(root: Path, to: int) -> None:
    """One line for each newer step, and step `to` whole."""
    found, complaints = newest_verified(root)
    assert found is not None and found.state["progress"]["step"] == to
    assert len(complaints) == 3 - to
    for step, line in zip(range(3, to, -1), complaints, strict=True):
        assert f"step-{step:08d}" in line
        assert line.endswith("trying an older step") and "\n" not in line


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([0, len(data) - 1, rng.randrange(len(data)), rng.randrange(len(data)) & ~4095])]


def _zero_page(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data)) & ~4095
    return data[:at] + bytes(len(data[at : at + 4096])) + data[at + 4096 :]


def _grow(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 9))


@pytest.mark.parametrize(("harm", "count"), [(_flip, 3000), (_cut, 1000), (_zero_page, 200), (_grow, 200)])
def test_every_damage_is_found_and_the_step_before_is_taken(
    harm: Callable[[bytes, random.Random], bytes], count: int, damaged: Path
) -> None:
    rng = random.Random(1)
    whole = {name: (damaged / "step-00000003" / name).read_bytes() for name in FILES}
    for _ in range(count):
        name = rng.choice(FILES)
        (damaged / "step-00000003" / name).write_bytes(harm(whole[name], rng))
        assert_falls_back(damaged, 2)
        (damaged / "step-00000003" / name).write_bytes(whole[name])


def test_files_in_the_wrong_place_are_found(damaged: Path) -> None:
    """Every file exchanged with every other of its step and of the step before; whole steps exchanged."""
    for name in FILES:
        mine = damaged / "step-00000003" / name
        for other, to in (("step-00000003", 2), ("step-00000002", 1)):
            for theirs in (damaged / other / other_name for other_name in FILES):
                if theirs != mine:
                    _exchange(mine, theirs)
                    assert_falls_back(damaged, to)
                    _exchange(mine, theirs)
    _exchange(damaged / "step-00000003", damaged / "step-00000002")
    assert_falls_back(damaged, 1)
    _exchange(damaged / "step-00000003", damaged / "step-00000002")


def _exchange(a: Path, b: Path) -> None:
    a.rename(a.with_name("aside"))
    b.rename(a)
    a.with_name("aside").rename(b)


def test_a_missing_or_unreadable_file_is_found(damaged: Path) -> None:
    for name in FILES:
        file = damaged / "step-00000003" / name
        data = file.read_bytes()
        file.unlink()
        assert_falls_back(damaged, 2)
        file.mkdir()  # reading it is an OSError, also for root
        assert_falls_back(damaged, 2)
        file.rmdir()
        file.write_bytes(data)


def test_an_edited_manifest_is_found(damaged: Path) -> None:
    file = damaged / "step-00000003" / "manifest.json"
    whole = file.read_bytes()
    tree = json.loads(whole)
    listed = tree["files"]
    first = listed["weights.safetensors"]
    edits: list[Any] = [
        {},
        [],
        [tree],
        None,
        7,
        "text",
        tree | {"format": 2},
        tree | {"format": None},
        {"format": 1},
        tree | {"files": None},
        tree | {"files": list(listed)},
        tree | {"files": {}},
        tree | {"files": listed | {"more.safetensors": first}},
        tree | {"files": {name: facts for name, facts in listed.items() if name != "state.json"}},
        *(
            tree | {"files": listed | {"weights.safetensors": facts}}
            for facts in (
                first | {"bytes": first["bytes"] + 1},
                first | {"bytes": str(first["bytes"])},
                first | {"sha256": first["sha256"].upper()},
                first | {"sha256": listed["exp_avg.safetensors"]["sha256"]},
                {"bytes": first["bytes"]},
                {"sha256": first["sha256"]},
                None,
                [],
            )
        ),
    ]
    for edit in [json.dumps(edit).encode() for edit in edits] + [b"[" * 100_000, b"9" * 5000, b"\xff\xfe"]:
        file.write_bytes(edit)
        assert_falls_back(damaged, 2)
    file.write_bytes(whole)


def test_a_run_with_no_whole_step_stops_instead_of_starting_afresh(tmp_path: Path) -> None:
    for step in (1, 2):
        file = save(tmp_path, step) / "state.json"
        file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole.*step-00000002.*step-00000001"):
        newest_verified(tmp_path)


# -- disks that say no


def _size_limit(limit: int) -> contextlib.AbstractContextManager[None]:
    """No file may grow beyond `limit` bytes: what a quota does, without rights of root."""

    @contextlib.contextmanager
    def limited() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited()


def assert_refused_and_untouched(root: Path, why: str) -> None:
    """Saving step 2 fails with a sentence; step 1 is whole, and the failed step leaves nothing behind."""
    with pytest.raises(CheckpointError) as caught:
        save(root, 2, numbers=PAGES)
    assert f"{root / 'step-00000002'}, 36,936 bytes, could not be written: {why}" in str(caught.value)
    found, complaints = newest_verified(root)
    assert complaints == [] and found is not None
    assert_holds(found, found.state["progress"]["step"], PAGES)
    assert not list(root.glob("*.tmp/*"))


def test_a_file_that_may_not_grow_is_an_error_and_harms_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1, numbers=PAGES)
    for limit in (0, 1, 100, 4096, 8192, 12_000, 12_400):
        with _size_limit(limit):
            assert_refused_and_untouched(tmp_path, "File too large")
    save(tmp_path, 2, numbers=PAGES)
    assert steps_in(tmp_path) == [1, 2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 KiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(
            f"needs the right to mount ({mounted.stderr.strip()}); the size limit above says the same"
        )
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_full_disk_is_an_error_and_harms_nothing(small_disk: Path) -> None:
    save(small_disk, 1, numbers=PAGES)
    for pages in range(0, 14):
        free = os.statvfs(small_disk).f_bavail
        (small_disk / "ballast").write_bytes(bytes(4096 * (free - pages)))
        assert_refused_and_untouched(small_disk, "No space left on device")
        (small_disk / "ballast").unlink()
    save(small_disk, 2, numbers=PAGES)
    assert_holds(open_verified(small_disk / "step-00000002"), 2, PAGES)


def test_a_read_only_disk_is_an_error_and_harms_nothing(small_disk: Path) -> None:
    save(small_disk, 1, numbers=PAGES)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert_refused_and_untouched(small_disk, "Read-only file system")


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file/checkpoints/step-00000001, .* could not be written: "):
        save(tmp_path / "file" / "checkpoints", 1)


# -- what stays


@settings(max_examples=40, deadline=None, database=None)
@given(
    steps=st.lists(st.integers(1, 99), unique=True, min_size=1, max_size=8).map(sorted),
    kept=st.sets(st.integers(1, 99)),
    keep_last=st.integers(1, 4),
)
def test_the_newest_and_the_kept_steps_stay(
    steps: list[int], kept: set[int], keep_last: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("run")
    for index, step in enumerate(steps):
        save(root, step, kept=step in kept, numbers=1)
        prune(root, step, keep_last)
        so_far = steps[: index + 1]
        assert steps_in(root) == sorted({*so_far[-keep_last:], *kept.intersection(so_far)})
    assert (root / "latest").read_text() == f"step-{steps[-1]:08d}\n"


def test_damaged_newer_steps_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    """Steps 4 and 5 were found damaged, and the run went on from 3: asked to stop, it saves between marks."""
    for step in (20, 30, 40, 50):
        save(tmp_path, step)
    for step in (40, 50):
        (tmp_path / f"step-{step:08d}" / "weights.safetensors").unlink()
    save(tmp_path, 35)
    prune(tmp_path, 35, keep_last=2)
    found, complaints = newest_verified(tmp_path)
    assert found is not None and found.state["progress"]["step"] == 35
    assert len(complaints) == 2
    assert steps_in(tmp_path) == [30, 35, 40, 50]


def test_a_step_that_cannot_be_read_stops_neither_pruning_nor_the_run(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step, damage in ((1, b"{"), (2, b"[]")):
        (tmp_path / f"step-{step:08d}" / "state.json").write_bytes(damage)
    save(tmp_path, 4)
    prune(tmp_path, 4, keep_last=1)
    assert steps_in(tmp_path) == [1, 2, 4]


def test_what_a_killed_process_left_behind_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in ("step-00000002.tmp", "step-00000001.old", "step-00000009.tmp"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    save(tmp_path, 2)
    prune(tmp_path, 2, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


def _save_and_remove_for_ever(root: Path) -> None:
    for step in range(2, 1 << 30):
        save(root, step)
        prune(root, step, keep_last=1)


def test_a_reader_beside_a_running_run_never_sees_half_a_step(tmp_path: Path) -> None:
    save(tmp_path, 1)
    writer = multiprocessing.get_context("fork").Process(
        target=_save_and_remove_for_ever, args=(tmp_path,), daemon=True
    )
    writer.start()
    seen = [1]
    while len(seen) < 150:
        assert writer.is_alive()
        found, complaints = newest_verified(tmp_path)
        assert found is not None and complaints == []
        step = found.state["progress"]["step"]
        assert step >= seen[-1]
        if step > seen[-1]:
            seen.append(step)
    writer.kill()
    writer.join()


def test_a_reader_whose_step_is_removed_under_its_eyes_finds_the_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run commits a step and removes the older one just after the reader listed the folder."""
    save(tmp_path, 1)
    glob, meanwhile = Path.glob, [2]

    def listed_before(path: Path, pattern: str) -> Iterator[Path]:
        listed = list(glob(path, pattern))
        while meanwhile:
            step = meanwhile.pop()
            save(tmp_path, step)
            prune(tmp_path, step, keep_last=1)
        return iter(listed)

    monkeypatch.setattr(Path, "glob", listed_before)
    found, complaints = newest_verified(tmp_path)
    assert steps_in(tmp_path) == [2]
    assert found is not None and complaints == []
    assert_holds(found, 2)


def test_going_back_in_a_run_that_has_newer_steps_is_refused(tmp_path: Path) -> None:
    """They would be taken by the next start, and the steps trained meanwhile be for nothing."""
    for step in (1, 2):
        save(tmp_path / "run", step)
    save(tmp_path / "other", 1)
    with pytest.raises(CheckpointError, match=r"step-00000002 is further than .*; give --resume auto"):
        choose_checkpoint(str(tmp_path / "run" / "step-00000001"), tmp_path / "run")
    others = str(tmp_path / "other" / "step-00000001")
    with pytest.raises(CheckpointError, match="step-00000002 is further than"):
        choose_checkpoint(others, tmp_path / "run")
    found, _ = choose_checkpoint(str(tmp_path / "run" / "step-00000001"), tmp_path / "new")
    assert found is not None
    assert_holds(found, 1)
    with pytest.raises(CheckpointError, match="holds checkpoints already"):
        choose_checkpoint("never", tmp_path / "run")
    with pytest.raises(CheckpointError, match="allowed are auto, never or the folder of a step"):
        choose_checkpoint("latest", tmp_path / "run")


def test_a_run_that_began_from_anothers_step_goes_on_with_its_own_by_the_same_command(tmp_path: Path) -> None:
    run, others = tmp_path / "run" / "checkpoints", str(tmp_path / "other" / "step-00000003")
    save(tmp_path / "other", 3)
    save(run, 4)
    (run.parent / "launches.jsonl").write_text(
        json.dumps({"arguments": ["--resume", others, "x=1"]}) + '\n{"ti'
    )
    for _ in range(2):
        found, (note,) = choose_checkpoint(others, run)
        assert (
            found is not None
            and note == f"the run began from --resume {others} and goes on with its own steps"
        )
        assert_holds(found, 4)
        shutil.rmtree(tmp_path / "other", ignore_errors=True)  # pruned meanwhile
    with pytest.raises(CheckpointError, match="allowed are auto, never or the folder of a step"):
        choose_checkpoint(others + "0", run)  # mistyped


# -- the background writer


def _fail() -> None:
    raise CheckpointError("the disk said no")


def test_a_step_goes_on_as_the_model_that_it_is_of_also_where_a_key_is_newer_than_the_step(
    tmp_path: Path,
) -> None:
    def facts(*overrides: str) -> dict[str, Any]:
        recipe = to_tree(load_recipe("tiny", list(overrides)))
        return {"recipe": recipe, "data_fingerprint": "", "tokenizer_sha256": "", "seed": 17}

    older = facts()
    del older["recipe"]["model"]["norm_placement"]
    step = open_verified(write_step(tmp_path, 4, tensors_of(4), {"progress": {"step": 4}, **older}))
    check_fits(step, facts("model.norm_placement=post"))
    with pytest.raises(CheckpointError, match="of another model: norm_placement post -> pre; change"):
        check_fits(step, facts("model.norm_placement=pre"))


def test_a_failed_write_is_raised_at_the_next_call_and_once() -> None:
    writer, written = BackgroundWriter(), []
    writer.submit(_fail)
    with pytest.raises(CheckpointError, match="the disk said no"):
        writer.submit(lambda: written.append("not after a failure"))
    writer.submit(lambda: written.append(1))
    writer.submit(_fail)
    with pytest.raises(CheckpointError, match="the disk said no"):
        writer.wait()
    writer.wait()
    assert written == [1]


def test_writes_are_made_beside_the_caller_one_after_the_other() -> None:
    writer, go, order = BackgroundWriter(), threading.Event(), list[str]()

    def slow() -> None:
        assert go.wait(10)
        order.append("first")

    writer.submit(slow)
    order.append("the caller went on")
    go.set()
    writer.submit(lambda: order.append("second"))
    writer.wait()
    assert order == ["the caller went on", "first", "second"]
