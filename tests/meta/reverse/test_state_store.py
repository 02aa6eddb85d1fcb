"""Kept states come back bit for bit from wherever they were, and leave nothing behind."""

import gc
import re
from pathlib import Path

import pytest
import torch

from hyperdescent.meta.reverse.checkpointing import Checkpoints, every, keep_all, online, revolve
from hyperdescent.meta.reverse.state_store import OnDisk, OnHost, find_store
from hyperdescent.meta.training.state import State

SPECS = ["device", "cpu", "disk", "folder"]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


def store_of(spec, folder):
    return find_store(folder if spec == "folder" else spec)


def first_state(device="cpu"):
    g = torch.Generator().manual_seed(0)
    p = torch.randn(7, generator=g, dtype=torch.float64)
    slots = {
        "v": torch.randn(7, generator=g).to(torch.bfloat16),
        "m": torch.tensor([0.0, -0.0, float("nan"), float("inf"), 5e-324], dtype=torch.float64),
        "count": torch.tensor(3),
    }
    buffers = {
        "still": torch.randn(2, 3, generator=g),
        "image": torch.randn(2, 3, 4, 5, generator=g).to(memory_format=torch.channels_last),
        "mask": torch.tensor([True, False]),
        "none": torch.empty(0),
    }
    state = State(p, slots, buffers)
    return State(p.to(device), *({n: x.to(device) for n, x in part.items()} for part in state[1:]))


def advance(i, state):
    """A step that replaces all but one buffer."""
    slots = {name: x + i for name, x in state.slots.items()}
    moved = {name: ~x if x.dtype == torch.bool else x * 1.5 for name, x in state.buffers.items()}
    return State(state.p.sin() + i, slots, moved | {"still": state.buffers["still"]})


def tensors(state):
    return [state.p, *state.slots.values(), *state.buffers.values()]


def bits(x):
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).tolist()


def assert_same(got, state):
    assert isinstance(got, State)
    # Lists: the order of the names matters.
    assert [*got.slots] == [*state.slots]
    assert [*got.buffers] == [*state.buffers]
    for a, b in zip(tensors(got), tensors(state), strict=True):
        assert (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())
        assert bits(a) == bits(b)


def chain(length, device="cpu"):
    states = [first_state(device)]
    for i in range(length - 1):
        states.append(advance(i, states[-1]))
    return states


def files_in(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS)
class TestRoundTrip:
    def test_every_bit_comes_back(self, spec, device, tmp_path):
        store, states = store_of(spec, tmp_path), chain(4, device)
        handles = [store.put(state) for state in states]
        for handle, state in reversed([*zip(handles, states, strict=True)]):
            assert_same(store.get(handle), state)
            assert_same(store.get(handle), state)
            store.drop(handle)

    def test_what_training_never_replaces_stays_one_object(self, spec, device, tmp_path):
        store, states = store_of(spec, tmp_path), chain(3, device)
        for handle in [store.put(state) for state in states]:
            got = store.get(handle)
            assert got.buffers["still"] is states[0].buffers["still"]

    @pytest.mark.parametrize("plan", [keep_all(), every(3), revolve(3), online(3)])
    def test_a_chain_there_and_back(self, spec, device, plan, tmp_path):
        states = chain(11, device)
        tape = Checkpoints(plan, store_of(spec, tmp_path), len(states))
        for i, state in enumerate(states):
            tape.offer(i, state)
        seen = []
        for i, state in tape.backwards(len(states), advance):
            assert_same(state, states[i])
            assert state.buffers["still"] is states[0].buffers["still"]
            seen.append(i)
        assert seen == [*reversed(range(len(states)))]
        assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("spec", ["cpu", "disk"])
def test_the_first_state_stays_where_it_is(spec):
    # Replay tells constant buffers by their identity with those of the start.
    store, (first, second) = find_store(spec), chain(2)
    got, other = [store.get(handle) for handle in [store.put(first), store.put(second)]]
    assert all(a is b for a, b in zip(tensors(got), tensors(first), strict=True))
    assert [n for n in first.buffers if other.buffers[n] is second.buffers[n]] == ["still"]


def test_host_memory_holds_copies():
    first, second = chain(2)
    store = find_store("cpu")
    store.put(first)
    handle = store.put(second)
    was = second.p.clone()
    second.p.zero_()
    assert torch.equal(store.get(handle).p, was)


def test_a_state_that_requires_grad_comes_back_without():
    first, second = chain(2)
    store = find_store("cpu")
    store.put(first)
    assert not store.get(store.put(second._replace(p=second.p.requires_grad_()))).p.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_of_a_gpu_are_pinned():
    class Shelf(OnDisk):
        def put(self, state):
            assert all(x.is_pinned() for x in state if x.numel())
            return super().put(state)

    store = OnHost(Shelf())
    for state in chain(2, "cuda"):
        store.put(state)


class TestDisk:
    def test_one_file_a_state_until_it_is_dropped(self, tmp_path):
        store = find_store(tmp_path)
        handles = [store.put(state) for state in chain(3)]
        for left in (3, 2, 1):
            assert len(files_in(tmp_path)) == left
            store.drop(handles.pop())
        assert not [*tmp_path.iterdir()]

    def test_only_what_changes_is_written(self, tmp_path):
        large = torch.zeros(100_000)
        store = find_store(tmp_path)
        for i in range(3):
            store.put(State(torch.full((3,), float(i)), {}, {"table": large}))
        assert sum(path.stat().st_size for path in files_in(tmp_path)) < large.nbytes / 10

    def test_a_view_is_written_without_the_rest(self, tmp_path):
        store = find_store(tmp_path)
        for _ in range(2):
            store.put(State(torch.zeros(100_000)[:3], {}, {}))
        assert sum(path.stat().st_size for path in files_in(tmp_path)) < 10_000

    def test_it_may_be_used_again(self, tmp_path):
        store, states = find_store(tmp_path), chain(2)
        for _ in range(2):
            for handle in [store.put(state) for state in states]:
                store.drop(handle)
        assert not [*tmp_path.iterdir()]

    def test_two_share_a_directory(self, tmp_path):
        (a, b), (first, second) = (find_store(tmp_path), find_store(tmp_path)), chain(2)
        handles = [store.put(state) for store in (a, b) for state in (first, second)]
        a.drop(handles[0])
        a.drop(handles[1])
        assert_same(b.get(handles[3]), second)

    def test_the_files_go_with_the_store(self, tmp_path):
        store = find_store(tmp_path)
        store.put(first_state())
        assert files_in(tmp_path)
        del store
        gc.collect()
        assert not [*tmp_path.iterdir()]

    def test_the_files_go_after_an_exception(self, tmp_path):
        def fail():
            states = chain(6)
            tape = Checkpoints(revolve(3), find_store(tmp_path), len(states))
            for i, state in enumerate(states):
                tape.offer(i, state)
            for i, _ in tape.backwards(len(states), advance):
                assert files_in(tmp_path)
                if i == 3:
                    raise RuntimeError("no derivative")

        with pytest.raises(RuntimeError):
            fail()
        gc.collect()
        assert not [*tmp_path.iterdir()]

    def test_the_temporary_directory_is_the_system_s(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        store = find_store("disk")
        store.put(first_state())
        assert len(files_in(tmp_path)) == 1


class TestFindStore:
    @pytest.mark.parametrize("spec", ["gpu", "dsk", "", "/tmp"])
    def test_what_is_no_store(self, spec):
        message = f"no store '{spec}'.* known: cpu, device, disk; a directory is given as a pathlib"
        with pytest.raises(ValueError, match=message):
            find_store(spec)

    def test_a_directory_that_is_not_there(self, tmp_path):
        gone = tmp_path / "gone"
        with pytest.raises(ValueError, match=f"{re.escape(str(gone))}' is not a directory; make"):
            find_store(gone)
