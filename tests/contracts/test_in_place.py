"""What may go wrong when a rule runs in a model's own memory, provoked by rules written for it."""

import copy
import gc
import weakref

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from hyperdescent.inner.compose.partition import partition
from hyperdescent.inner.core.flat import flat_step, initial_slots
from hyperdescent.inner.core.hyper import Hyper, learning_rate
from hyperdescent.inner.core.layout import Layout
from hyperdescent.inner.core.rule import rule
from hyperdescent.inner.core.slots import Slot, number, shared, weights, with_shape, zeros
from hyperdescent.inner.numerics.elementwise import root
from hyperdescent.inner.registry import RULES, find_rule
from hyperdescent.inner.torch_form import optimizer as optim
from hyperdescent.inner.torch_form.buckets import Bucket, StepConfig
from hyperdescent.inner.torch_form.optimizer import torch_form

F64 = torch.float64
DEFAULT = StepConfig()
SHAPES = [(3, 4), (5,), (), (2, 2, 2)]
any_number = Hyper(0.5, -10.0, 10.0, "linear", (-1.0, 1.0))


def noise(seed, shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def configured(form, config):
    """A torch form with another way of gathering tensors."""
    return type(form.__name__, (form,), {"config": config})


def assert_the_rule(
    rule, *, dtype=torch.float32, shapes=SHAPES, grad=noise, config=DEFAULT, **given
):
    """The torch form is flat_step bit for bit, weights and slots, in bunches and alone."""
    for some in (shapes, [shape for shape in shapes if shape][:1]):
        params = [torch.nn.Parameter(noise(i, shape, dtype)) for i, shape in enumerate(some)]
        layout = Layout.of({str(i): p.detach() for i, p in enumerate(params)})
        p = torch.cat([x.detach().reshape(-1) for x in params])
        values = rule.values(given)
        s = initial_slots(rule, layout, p, values)
        optimizer = configured(torch_form(rule), config)(params, **given)
        for step in range(1, 5):
            for i, q in enumerate(params):
                q.grad = grad(10 * step + i, q.shape, dtype)
            g, t = torch.cat([q.grad.reshape(-1) for q in params]), torch.tensor(step, dtype=F64)
            loss = torch.tensor(1.0 + step, dtype=F64)
            p, s = flat_step(rule, layout, p, g, s, t, values, loss=loss)
            optimizer.step(loss=loss)
            ours = torch.cat([q.detach().reshape(-1) for q in params])
            torch.testing.assert_close(ours, p, rtol=0, atol=0)
            for name in optimizer.state[params[0]]:
                ours = torch.cat([optimizer.state[q][name].reshape(-1) for q in params])
                if s[name].ndim:
                    torch.testing.assert_close(ours, s[name], rtol=0, atol=0)


class TestElements:
    @pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
    @pytest.mark.parametrize("gate", [0.0, 0.3, 1.0])
    def test_numbers_times_truth_values(self, gate, dtype):
        @rule("Counting", lr=any_number, gate=any_number)
        def counting(p, g, s, t, lr, gate):
            steps = (g > 0) * gate + (p > 0) * gate
            return p - (lr * steps).to(p.dtype), s

        assert_the_rule(counting, gate=gate, dtype=dtype)

    @pytest.mark.parametrize("gate", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("lr", [0.0, 0.5, 1.0])
    def test_numbers_in_the_place_of_vectors(self, gate, lr):
        @rule("Shifted", slots={"m": zeros}, lr=any_number, gate=any_number)
        def shifted(p, g, s, t, lr, gate):
            m = gate * g + lr
            return p - lr * root(gate * g * g) - torch.sqrt(m * m) * (lr - gate * g), {"m": m}

        assert_the_rule(shifted, gate=gate, lr=lr)

        @rule("Filled", slots={"m": zeros}, lr=any_number, gate=any_number)
        def filled(p, g, s, t, lr, gate):
            m = gate * g + lr
            above = lr / (m * m + 1) * (gate + m) * (gate - m)
            return p - torch.exp(m) * (m - m / lr) - above, {"m": m * m}

        if lr:
            assert_the_rule(filled, gate=gate, lr=lr)

    def test_written_zeros_and_ones(self):
        @rule("Literal", slots={"m": zeros}, lr=any_number)
        def literal(p, g, s, t, lr):
            m = torch.sqrt(s["m"] * 0.0 + 1.0) * 1.0
            return p - lr * (torch.exp(g * 0.0) + g * 1), {"m": m + root(g * 0.0)}

        assert_the_rule(literal)
        assert_the_rule(literal, lr=0.0)

    def test_a_guarded_root_of_another_guard(self):
        @rule("Signed", lr=any_number)
        def signed(p, g, s, t, lr):
            low = g <= 0
            return p - lr * torch.where(low, g, torch.where(low, 1.0, g).sqrt()), s

        assert_the_rule(signed)

    def test_a_slot_becomes_another(self):
        @rule("Turning", slots={"a": weights, "b": zeros, "c": zeros}, lr=any_number)
        def turning(p, g, s, t, lr):
            return s["a"] - lr * g, {"a": s["b"] + g, "b": s["c"], "c": p}

        assert_the_rule(turning)

        @rule("Doubled", slots={"a": zeros, "b": zeros, "c": zeros}, lr=any_number)
        def doubled(p, g, s, t, lr):
            m = s["a"] * 0.5 + g
            return p - lr * s["c"], {"a": m, "b": m, "c": g}

        assert_the_rule(doubled)

    @pytest.mark.parametrize("shapes", [SHAPES, [(1,), ()], [(3,), ()]], ids=str)
    def test_views_and_vectors_made_of_shapes(self, shapes):
        @rule("Viewed", slots={"a": zeros, "b": zeros}, lr=any_number)
        def viewed(p, g, s, t, lr):
            before = p.view_as(g).expand(p.shape)
            return p - lr * g - p.new_ones(p.shape), {"a": before, "b": s["a"].view(g.shape)}

        assert_the_rule(viewed, shapes=shapes)

    def test_vectors_that_are_constant(self):
        @rule("Filling", slots={"a": zeros}, lr=any_number)
        def filling(p, g, s, t, lr):
            ones = torch.ones_like(p, device=p.device)
            return p - lr * torch.full_like(g, 2.0) * ones.to(p), {"a": torch.zeros_like(p)}

        assert_the_rule(filling)

    def test_steps_that_write_in_place_on_their_own(self):
        @rule("Writing", slots={"m": zeros}, lr=any_number)
        def writing(p, g, s, t, lr):
            m = s["m"] + g
            half = m.clone().mul_(0.5)
            return p - lr * half - m, {"m": m}

        assert_the_rule(writing)

    def test_a_number_of_its_own_per_tensor(self):
        @rule("Counted", slots={"count": number(1.0)}, lr=any_number)
        def counted(p, g, s, t, lr):
            return p - (lr / s["count"]).to(p.dtype) * g, {"count": s["count"] + 1}

        assert_the_rule(counted)

    def test_slots_of_one_number_that_are_the_counter(self):
        @rule("Clock", slots={"last": shared(0.0), "late": shared(1.0)}, lr=any_number)
        def clock(p, g, s, t, lr):
            return p - lr * (t - s["last"]) * g * s["late"], {"last": t, "late": s["last"]}

        assert_the_rule(clock)

    def test_slots_of_a_longer_dtype(self):
        def double(p, values, layout):
            return torch.zeros_like(p, dtype=torch.float32)

        @rule("Long", slots={"m": Slot(double)}, lr=any_number)
        def long(p, g, s, t, lr):
            m = s["m"] * 0.9 + g.to(torch.float32)
            return p - (lr * m).to(p.dtype), {"m": m}

        assert_the_rule(long, dtype=torch.bfloat16)

    def test_numbers_that_become_0_and_come_back(self):
        sgd = optim.SGD.rule
        p = torch.nn.Parameter(noise(99, (4,)))
        optimizer = optim.SGD([p])
        q, s = p.detach().clone(), {"momentum_buffer": torch.zeros(4)}
        for step in range(1, 40):
            given = {"lr": step % 3 / 2, "momentum": step // 2 % 2 * 0.5, "weight_decay": step % 2}
            optimizer.param_groups[0].update(given)
            p.grad = g = noise(step, (4,))
            optimizer.step()
            values, t = sgd.values({**given, "dampening": 0.0}), torch.tensor(step, dtype=F64)
            q, s = sgd(q, g, s, t, values)
            assert torch.equal(p.detach(), q)
            assert torch.equal(optimizer.state[p]["momentum_buffer"], s["momentum_buffer"])

    @pytest.mark.parametrize("config", [StepConfig(block=5), StepConfig(block=5, bucket_numel=7)])
    def test_blocks(self, config):
        assert_the_rule(optim.NAdam.rule, config=config)

    @pytest.mark.parametrize(
        "laid",
        [
            lambda seed, shape, dtype: noise(seed, shape[1:], dtype).expand(shape),
            lambda seed, shape, dtype: noise(seed, shape[::-1], dtype).permute(
                [*reversed(range(len(shape)))]
            ),
            lambda seed, shape, dtype: noise(seed, (*shape, 2), dtype)[..., 1],
        ],
        ids=["expanded", "transposed", "strided"],
    )
    def test_gradients_as_they_lie(self, laid):
        assert_the_rule(optim.Adam.rule, grad=laid)


def step(optimizer, params, seed=0):
    for i, p in enumerate(params):
        p.grad = noise(seed + i, p.shape, p.dtype)
    optimizer.step(loss=1.0)


class TestMemory:
    def test_a_slot_that_is_the_gradient_survives_the_next_one(self):
        @rule("Recalling", slots={"last": zeros}, over="tensor", lr=learning_rate(0.5))
        def recalling(p, g, s, t, lr):
            return p - lr * s["last"], {"last": g}

        p = torch.nn.Parameter(torch.zeros(3))
        optimizer = torch_form(recalling)([p])
        p.grad = torch.ones(3)
        for _ in range(3):
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            p.grad += 1
        assert torch.equal(p.detach(), torch.full((3,), -1.0))

    def test_gradients_are_left_as_they_are(self):
        for shapes in (SHAPES, [(4,)]):
            params = [torch.nn.Parameter(noise(i, s)) for i, s in enumerate(shapes)]
            optimizer = optim.Adan(params, maximize=True, weight_decay=0.1)
            for seed in range(3):
                step(optimizer, params, seed)
                assert all(
                    torch.equal(p.grad, noise(seed + i, p.shape)) for i, p in enumerate(params)
                )

    @pytest.mark.parametrize("form", [optim.Adam, optim.AdamW, optim.Muon, optim.Prodigy])
    def test_a_graph_of_older_weights_is_noticed(self, form):
        """In bunches, and alone."""
        for shapes in (SHAPES, [(4,)]):
            params = [torch.nn.Parameter(noise(i, s)) for i, s in enumerate(shapes)]
            loss = sum((p**3).sum() for p in params)
            step(form(params), params)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()

    def test_parameters_that_are_parts_of_one_tensor(self):
        whole, alone = noise(0, (6,)), torch.nn.Parameter(noise(0, (6,)))
        parts = [torch.nn.Parameter(whole[:2]), torch.nn.Parameter(whole[2:])]
        ours, theirs = optim.Adam(parts, lr=0.1), optim.Adam([alone], lr=0.1)
        for seed in range(3):
            alone.grad = noise(seed, (6,))
            for p, g in zip(parts, alone.grad.split([2, 4]), strict=True):
                p.grad = g
            ours.step()
            theirs.step()
        assert torch.equal(whole, alone.detach())
        assert parts[0].data_ptr() == whole.data_ptr()

    def test_a_tied_weight_is_stepped_once(self):
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
        model["b"].weight = model["a"].weight
        optimizer = optim.SGD(model.parameters(), lr=1.0)
        before = model["a"].weight.detach().clone()
        model["a"].weight.grad = torch.ones(3, 3)
        optimizer.step()
        assert torch.equal(model["b"].weight.detach(), before - 1)

    def test_slots_are_held_once_whichever_parameters_move(self):
        """Bunches of earlier steps hold no memory."""
        params = [torch.nn.Parameter(noise(i, (5,))) for i in range(6)]
        optimizer = optim.Adam(params)
        step(optimizer, params)
        for still in range(6):
            for i, p in enumerate(params):
                p.grad = None if i == still else torch.ones(5)
            optimizer.step()
        gc.collect()
        held = {
            x.untyped_storage().data_ptr() for s in optimizer.state.values() for x in s.values()
        }
        alive = [x for x in gc.get_objects() if type(x) is Bucket and params[0] in x.params]
        assert len(alive) <= 1
        for unit in alive:
            assert {x.untyped_storage().data_ptr() for x in unit.flat.values()} <= held

    def test_groups_and_parameters_that_are_taken_out_are_let_go(self):
        groups = [{"params": [torch.nn.Parameter(noise(i, (5,)))]} for i in range(3)]
        optimizer = optim.Adam(groups)
        step(optimizer, [p for group in groups for p in group["params"]])
        gone = weakref.ref(groups[2]["params"][0])
        optimizer.state.pop(gone())
        del optimizer.param_groups[2], groups[2]
        optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(noise(7, (5,)))
        step(optimizer, [p for group in optimizer.param_groups for p in group["params"]])
        gc.collect()
        assert gone() is None
        assert len(optimizer._gathered) == 2

    def test_parameters_that_take_turns(self):
        def run(form):
            params = [torch.nn.Parameter(noise(i, (5,), F64)) for i in range(4)]
            optimizer = form([{"params": [p]} for p in params] if form is alone else params)
            for at in range(9):
                for i, p in enumerate(params):
                    p.grad = None if (at + i) % 3 == 0 else noise(at, (5,), F64)
                optimizer.step()
            return [p.detach() for p in params]

        together, alone = optim.RMSprop, lambda params: torch.optim.RMSprop(params)
        torch.testing.assert_close(run(together), run(alone), rtol=1e-12, atol=1e-14)


class TestLoading:
    def test_a_counter_may_be_set_to_a_plain_number(self):
        def run(start):
            p = torch.nn.Parameter(noise(0, (3,)))
            nadam = optim.NAdam([p], lr=0.1)
            nadam.param_groups[0]["t"] = start
            step(nadam, [p])
            step(nadam, [p], 1)
            return p.detach()

        assert torch.equal(run(4), run(torch.tensor(4.0, dtype=F64)))

    def test_of_a_longer_dtype(self):
        def params(dtype):
            return [torch.nn.Parameter(noise(i, (5,), dtype)) for i in range(2)]

        long = optim.AEGDM(params(torch.float32))
        for p in long.param_groups[0]["params"]:
            p.grad = noise(3, (5,))
        long.step(loss=2.0)
        short = optim.AEGDM(params(torch.bfloat16))
        short.load_state_dict(long.state_dict())
        (first, _) = short.param_groups[0]["params"]
        dtypes = {n: x.dtype for n, x in short.state[first].items()}
        assert dtypes == {"r": torch.float32, "momentum_buffer": torch.bfloat16}

    def test_of_another_rule(self):
        sgd = optim.SGD([p := torch.nn.Parameter(torch.ones(2))])
        step(sgd, [p])
        adam = optim.Adam([p])
        with pytest.raises(ValueError, match=r"not one of Adam.* no slot momentum_buffer; .* m, v"):
            adam.load_state_dict(sgd.state_dict())
        assert adam.param_groups[0]["betas"] == (0.9, 0.999)

    def test_hooks_may_change_what_is_loaded(self):
        p = torch.nn.Parameter(torch.ones(2))
        adam = optim.Adam([p])
        step(adam, [p])

        def halved(optimizer, given):
            given["state"] = {
                i: {n: x / 2 for n, x in s.items()} for i, s in given["state"].items()
            }
            return given

        saved = copy.deepcopy(adam.state_dict())
        adam.register_load_state_dict_pre_hook(halved)
        adam.load_state_dict(dict(saved))
        assert torch.equal(adam.state[p]["m"], saved["state"][0]["m"] / 2)
        assert len(adam._optimizer_load_state_dict_pre_hooks) == 1

    def test_a_snapshot_of_a_rate_that_a_scheduler_fills(self):
        adam = optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=torch.tensor(1.0))
        scheduler = LambdaLR(adam, lambda step: 0.5**step)
        saved = adam.state_dict()
        step(adam, adam.param_groups[0]["params"])
        scheduler.step()
        assert adam.param_groups[0]["lr"] == 0.5
        assert saved["param_groups"][0]["lr"] == 1

    def test_bunches_stay(self):
        params = [torch.nn.Parameter(noise(i, (3,))) for i in range(3)]
        adam = optim.Adam(params)
        step(adam, params)
        before = [x for p in params for x in adam.state[p].values()]
        step(adam, params)
        after = [x for p in params for x in adam.state[p].values()]
        assert len(after) == 6 and all(x is y for x, y in zip(before, after, strict=True))

    def test_bunches_end_where_slots_are_replaced(self):
        params = [torch.nn.Parameter(noise(i, (3,))) for i in range(3)]
        adam = optim.Adam(params)
        step(adam, params)
        adam.state[params[1]] = {n: torch.zeros(3) for n in ("m", "v")}
        for p in params:
            p.grad = torch.ones(3)
        adam.step()
        torch.testing.assert_close(adam.state[params[1]]["m"], torch.full((3,), 0.1))


class TestWhole:
    """Rules over a tensor or the model."""

    def test_what_has_no_gradient_is_no_part_of_a_step(self):
        def trained(shapes, still):
            params = [torch.nn.Parameter(noise(len(shape), shape, F64)) for shape in shapes]
            optimizer = torch_form("clip_norm(adam, max_norm=0.5)")(params)
            for step in range(2):
                for p in params:
                    p.grad = None if p.ndim in still else noise(10 * step + p.ndim, p.shape, F64)
                optimizer.step()
            return [p.detach() for p in params]

        weights = trained(SHAPES, still=(1,))
        others = trained([shape for shape in SHAPES if len(shape) != 1], still=())
        # The norm's sum is of as many numbers more, all 0.
        torch.testing.assert_close([weights[i] for i in (0, 2, 3)], others, rtol=1e-11, atol=0)
        assert torch.equal(weights[1], noise(1, SHAPES[1], F64))

    @pytest.mark.parametrize("over", ["tensor", "model"])
    def test_a_rule_that_branches_on_a_value_is_done_as_it_is_written(self, over):
        @rule("Branching", over=over, lr=any_number)
        def branching(p, g, s, t, lr):
            return p - lr * (g / 2 if g.abs().max() > 1 else g), s

        for scale in (0.1, 10.0):
            p = torch.nn.Parameter(torch.ones(3, 4))
            p.grad = torch.full((3, 4), scale)
            torch_form(branching)([p], lr=1.0).step()
            moved = scale / 2 if scale > 1 else scale
            torch.testing.assert_close(p.detach(), torch.full((3, 4), 1 - moved))

    def test_a_slot_that_begins_from_a_value(self):
        def length(p, values, layout):
            return torch.zeros_like(p) + float(p.norm())

        def one(p, values, layout):
            return p.new_ones(()).expand(p.shape)

        for init in (length, one):

            @rule("Beginning", over="tensor", slots={"m": Slot(init)}, lr=any_number)
            def beginning(p, g, s, t, lr):
                return p - lr * s["m"] * g / g.abs().sum(), {"m": s["m"] + g}

            p = torch.nn.Parameter(torch.full((2, 2), 0.5))
            p.grad = torch.ones(2, 2)
            optimizer = torch_form(beginning)([p], lr=1.0)
            optimizer.step()
            torch.testing.assert_close(p.detach(), torch.full((2, 2), 0.25))
            assert torch.equal(optimizer.state[p]["m"], torch.full((2, 2), 2.0))

    @pytest.mark.parametrize("name", ["clip_norm(adamw)", "clip_tensor(sgd)"])
    def test_an_infinite_gradient_is_seen(self, name):
        """It makes the factor 0 by which it is multiplied."""
        p = torch.nn.Parameter(torch.ones(4))
        p.grad = torch.tensor([torch.inf, 1.0, 1.0, 1.0])
        torch_form(find_rule(name))([p]).step()
        assert p[0].isnan()

    def test_of_a_tensor_by_its_name(self):
        """Tensors of one shape and different rules."""
        parted = partition("alphagrad", "adam", where=lambda name, shape: name == "a")
        params = {name: torch.nn.Parameter(noise(0, (4, 4))) for name in "ab"}
        optimizer = torch_form(parted)([*params.items()], lr=0.1, rest_lr=0.1)
        for p in params.values():
            p.grad = noise(1, (4, 4))
        optimizer.step()
        alone = {"a": optim.AlphaGrad, "b": optim.Adam}
        for name, form in alone.items():
            p = torch.nn.Parameter(noise(0, (4, 4)))
            p.grad = noise(1, (4, 4))
            form([p], lr=0.1).step()
            torch.testing.assert_close(params[name].detach(), p.detach())


OVER_TENSORS = [name for name, rule in RULES.items() if rule.over == "tensor"]


class TestStacks:
    """Tensors of a kind as one batch."""

    @staticmethod
    def form(name, stack_from=2):
        return configured(torch_form(name), StepConfig(stack_from=stack_from))

    @staticmethod
    def stacks(optimizer):
        found = [bucket for each in optimizer._gathered.values() for bucket in each.buckets]
        return [(len(each.params), each.batched) for each in found if len(each.params) > 1]

    @pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "name",
        [*OVER_TENSORS, "cautious(muon)", "clip_tensor(rmsprop)", "partition(muon, adamw)"],
    )
    def test_are_the_rule_on_each(self, name, dtype):
        def run(form, *, load=False):
            shapes = [(6, 4), (5,), (6, 4), (), (5,), (6, 4), (), (3, 2, 2), (0, 4), (0, 4)]
            params = [torch.nn.Parameter(noise(i, s, dtype)) for i, s in enumerate(shapes)]
            optimizer = form(params)
            for seed in range(3):
                step(optimizer, params, 100 * seed)
                if load:
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            found = self.stacks(optimizer)
            slots = [dict(optimizer.state[p]) for p in params]
            return [p.detach() for p in params], slots, found

        weights, slots, found = run(self.form(name))
        assert found == [(3, True), (2, True)]
        alone, theirs, found = run(self.form(name, stack_from=100))
        assert not found
        bounds = {"rtol": 1e-9, "atol": 1e-11} if dtype == F64 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(weights, alone, **bounds)
        torch.testing.assert_close(slots, theirs, **bounds)
        resumed, _, _ = run(self.form(name), load=True)
        torch.testing.assert_close(weights, resumed, rtol=0, atol=0)

    def test_a_rule_that_branches_on_a_value_is_done_one_by_one(self):
        @rule("Choosing", over="tensor", slots={"m": zeros}, lr=any_number)
        def choosing(p, g, s, t, lr):
            return p - lr * (g / 2 if g.abs().max() > 1 else g), {"m": s["m"] + g}

        params = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
        optimizer = self.form(choosing)(params, lr=1.0)
        with pytest.warns(
            UserWarning, match="Choosing steps tensors of one shape one by one"
        ) as told:
            for _ in range(2):
                for scale, p in zip((0.1, 0.2, 4.0), params, strict=True):
                    p.grad = torch.full((4,), scale)
                optimizer.step()
        assert len(told) == 1
        assert self.stacks(optimizer) == [(3, False)]
        ends = [float(p.detach()[0]) for p in params]
        assert ends == pytest.approx([0.8, 0.6, -3.0])
        assert float(optimizer.state[params[2]]["m"][0]) == 8.0

    def test_a_slot_that_grows_is_done_one_by_one(self):
        @rule(
            "Growing", over="tensor", slots={"seen": with_shape(lambda shape: (1,))}, lr=any_number
        )
        def growing(p, g, s, t, lr):
            return p - lr * g * s["seen"].numel(), {"seen": torch.cat([s["seen"], g[:1]])}

        params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
        optimizer = self.form(growing)(params, lr=1.0)
        with pytest.warns(UserWarning, match="a slot that changes its shape"):
            for _ in range(2):
                for p in params:
                    p.grad = torch.ones(4)
                optimizer.step()
        assert [float(p.detach()[0]) for p in params] == [-2.0, -2.0]
        assert optimizer.state[params[0]]["seen"].tolist() == [0.0, 1.0, 1.0]

    def test_slots_that_are_replaced_or_written_into(self):
        params = [torch.nn.Parameter(noise(i, (3,))) for i in range(3)]
        form = self.form("cadamw")(params)
        step(form, params)
        form.state[params[1]] = {n: torch.zeros_like(x) for n, x in form.state[params[1]].items()}
        form.state[params[2]]["m"].zero_()
        for p in params:
            p.grad = torch.ones(3)
        form.step()
        for p in params[1:]:
            torch.testing.assert_close(form.state[p]["m"], torch.full((3,), 0.1))

    def test_tensors_of_one_shape_and_different_rules_are_apart(self):
        parted = partition("alphagrad", "normalizedsgd", where=lambda name, shape: name > "1")
        params = [(str(i), torch.nn.Parameter(noise(i, (3,)))) for i in range(4)]
        optimizer = self.form(parted)(params)
        step(optimizer, [p for _, p in params])
        assert self.stacks(optimizer) == [(2, True), (2, True)]
