"""What the torch form of every rule promises to code that knows torch.optim only."""

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from hyperdescent.inner.core.flat import flat_readout
from hyperdescent.inner.core.layout import Layout
from hyperdescent.inner.registry import RULES, find_rule
from hyperdescent.inner.torch_form.optimizer import torch_form
from hyperdescent.inner.torch_form.param_groups import values_in

F64 = torch.float64
COMPOSED = ["cautious(muon)", "clip_norm(adamw)", "ema(sgd)"]
ALL = [*RULES.values(), *map(find_rule, COMPOSED)]
SHAPES = [(3, 4), (5,), (), (2, 3, 2, 2)]


def over(rules):
    return pytest.mark.parametrize("rule", rules, ids=[rule.name for rule in rules])


each_rule = over(ALL)
each_readout = over([rule for rule in ALL if rule.readout])


def noise(seed, shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def parameters(dtype=torch.float32, shapes=SHAPES):
    return [torch.nn.Parameter(noise(i, shape, dtype)) for i, shape in enumerate(shapes)]


def moving(rule):
    """Rates at which a few steps show, and momenta that are on."""
    given = {"lr": 0.05} if rule.hypers["lr"].default < 1 else {}
    return given | ({"momentum": 0.7} if "momentum" in rule.hypers else {})


def build(rule, params=None, **given):
    return torch_form(rule)(parameters() if params is None else params, **moving(rule) | given)


def weights(optimizer):
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def loss_of(params, step):
    """Positive; its gradient depends on the weights."""
    pairs = [(p, noise(1000 * step + i, p.shape, p.dtype)) for i, p in enumerate(params)]
    return sum((1 - torch.cos(p)).sum() + (p * drift).sum() for p, drift in pairs) + 20


def given_loss(rule, loss):
    return {"loss": loss.detach()} if "loss" in rule.needs else {}


def descend(optimizer, steps=5, start=0, *, then=lambda: None):
    """Steps of an optimizer along its own weights, each with something after it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = loss_of(params, step)
        loss.backward()
        optimizer.step(**given_loss(optimizer.rule, loss))
        then()
    return weights(optimizer)


def copied(tensors):
    return [x.clone() for x in tensors]


def assert_same(ours, theirs):
    """Tensors to the bit, in lists and dicts; everything else by ==."""
    if isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    elif isinstance(ours, dict | list | tuple):
        assert len(ours) == len(theirs)
        for at in ours if isinstance(ours, dict) else range(len(ours)):
            assert_same(ours[at], theirs[at])
    else:
        assert ours == theirs


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def in_groups(rule):
    """Two groups, and a third that comes later."""
    matrix, vector, number, kernel = parameters()
    optimizer = build(rule, [{"params": [matrix], "lr": 0.03}, {"params": [vector, number]}])
    return optimizer, {"params": [kernel], "lr": 0.02}


class TestSaving:
    @each_rule
    def test_a_run_resumed_from_a_file_is_bit_identical(self, rule):
        straight, late = in_groups(rule)
        descend(straight, 2)
        straight.add_param_group(late)
        descend(straight, 3, start=2)
        saved, there = through_a_file(straight.state_dict()), copied(weights(straight))
        resumed, late = in_groups(rule)
        resumed.add_param_group(late)
        resumed.load_state_dict(saved)
        torch._foreach_copy_(weights(resumed), there)
        assert_same(descend(resumed, 5, start=5), descend(straight, 5, start=5))

    @each_rule
    def test_a_state_dict_is_a_snapshot(self, rule):
        optimizer = build(rule)
        descend(optimizer, 2)
        saved = optimizer.state_dict()
        kept = copy.deepcopy(saved)
        descend(optimizer, 2, start=2)
        assert_same(saved, kept)

    @each_rule
    def test_a_loaded_state_dict_is_not_changed(self, rule):
        optimizer = build(rule)
        descend(optimizer, 2)
        given = copy.deepcopy(optimizer.state_dict())
        kept = copy.deepcopy(given)
        other = build(rule)
        other.load_state_dict(given)
        for slots in other.state.values():
            for x in slots.values():
                x.fill_(3)
        descend(other, 2)
        assert_same(given, kept)

    @pytest.mark.parametrize(
        "copied_pair",
        [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
        ids=["deepcopy", "pickle"],
    )
    @each_rule
    def test_a_copy_goes_on_alike_and_apart(self, rule, copied_pair):
        model = torch.nn.ParameterList(parameters())
        optimizer = build(rule, model.parameters())
        descend(optimizer, 3)
        other_model, other = copied_pair((model, optimizer))
        before = copied(model)
        after = copied(descend(other, 3, start=3))
        assert_same([p.detach() for p in other_model], after)
        assert_same([p.detach() for p in model], before)
        assert_same(descend(optimizer, 3, start=3), after)


class TestSchedulers:
    @staticmethod
    def assert_by_hand(rule, make, names, step=lambda scheduler: scheduler.step()):
        """A scheduled run is that in which its values are set by hand, and not the plain one."""
        optimizer = build(rule)
        (group,) = optimizer.param_groups
        scheduler = make(optimizer)
        seen = []

        def then():
            step(scheduler)
            seen.append({n: copy.deepcopy(group[n]) for n in names})

        first = {n: copy.deepcopy(group[n]) for n in names}
        scheduled = descend(optimizer, 5, then=then)
        by_hand, plain = build(rule), build(rule)
        values = iter(seen)
        by_hand.param_groups[0].update(first)
        plain.param_groups[0].update(first)
        by_hand_weights = descend(
            by_hand, 5, then=lambda: by_hand.param_groups[0].update(next(values))
        )
        assert_same(scheduled, by_hand_weights)
        assert len({x["lr"] for x in seen}) > 1
        assert any(not torch.equal(*pair) for pair in zip(scheduled, descend(plain), strict=True))

    @each_rule
    def test_lambda(self, rule):
        self.assert_by_hand(rule, lambda o: LambdaLR(o, lambda step: 1 / (1 + step)), ["lr"])

    @each_rule
    def test_one_cycle(self, rule):
        cycled = {"momentum", "betas"} & {*build(rule).defaults}
        highest = 10 * rule.hypers["lr"].default

        def make(optimizer):
            return OneCycleLR(optimizer, max_lr=highest, total_steps=8, cycle_momentum=bool(cycled))

        self.assert_by_hand(rule, make, ["lr", *cycled])

    @each_rule
    def test_plateau(self, rule):
        def make(optimizer):
            return ReduceLROnPlateau(optimizer, factor=0.5, patience=0)

        self.assert_by_hand(rule, make, ["lr"], lambda scheduler: scheduler.step(1.0))


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @each_rule
    def test_short_floats_train(self, rule, dtype):
        if (rule.name, dtype) == ("prodigy", torch.float16):
            pytest.skip("its first rate is 1e-6, and the square of that is 0 in float16")
        optimizer = build(rule, parameters(dtype))
        before = copied(weights(optimizer))
        after = descend(optimizer, 4)
        assert {p.dtype for p in after} == {dtype}
        assert all(p.isfinite().all() for p in after)
        # Rules that look for their rate begin with steps that these floats do not show.
        assert rule.hypers["lr"].default == 1 or not all(map(torch.equal, before, after))
        for slots in optimizer.state.values():
            assert {x.dtype for x in slots.values()} <= {dtype, torch.float32}
            assert all(x.isfinite().all() for x in slots.values())
        assert optimizer.param_groups[0]["t"].dtype == F64

    @each_rule
    def test_gradient_scaler(self, rule):
        scaled, plain = build(rule), build(rule)
        params = scaled.param_groups[0]["params"]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for step in range(5):
            scaled.zero_grad()
            loss = loss_of(params, step)
            scaler.scale(loss).backward()
            scaler.step(scaled, **given_loss(rule, loss))
            scaler.update()
        # A scale that is a power of 2 rounds nothing.
        assert_same(weights(scaled), descend(plain))

        before, there = copy.deepcopy(scaled.state_dict()), copied(weights(scaled))
        loss = loss_of(params, 5)
        scaler.scale(loss).backward()
        params[1].grad[0] = torch.inf
        scaler.step(scaled, **given_loss(rule, loss))
        scaler.update()
        assert_same(weights(scaled), there)
        assert_same(scaled.state_dict(), before)


class TestErrors:
    @each_rule
    def test_illegal_numbers(self, rule):
        form = torch_form(rule)
        for name, hyper in rule.hypers.items():
            bad = [float("nan"), *([hyper.low - 1] if hyper.low > -math.inf else [])]
            if hyper.scale == "logit":
                bad += [1.0, 1.5]
            for value in bad:
                with pytest.raises(ValueError, match=rf"^{name}={value:g} is outside \["):
                    form(parameters(), **{name: value})
                optimizer = form([parameters()[0]])
                with pytest.raises(ValueError, match=rf"^{name}={value:g} is outside \["):
                    optimizer.add_param_group({"params": parameters(), name: value})
                assert len(optimizer.param_groups) == 1
        assert rule.hypers["lr"].low == 0

    @each_rule
    def test_unknown_arguments(self, rule):
        for name in [*rule.hypers, *rule.choices]:
            misspelt = name + "s" if name != "beta" else "betta"
            if misspelt in rule.hypers or len(misspelt) < 4:
                continue
            with pytest.raises(TypeError, match=f"no argument '{misspelt}'; did you mean '"):
                torch_form(rule)(parameters(), **{misspelt: 0.5})
        with pytest.raises(TypeError, match="no argument 'lrr'; did you mean 'lr'"):
            torch_form(rule)(parameters(), lrr=0.5)

    @each_rule
    def test_parameters_that_it_does_not_take(self, rule):
        form = torch_form(rule)
        with pytest.raises(ValueError, match="empty parameter list"):
            form([])
        with pytest.raises(TypeError, match="'params'"):
            form()
        phase = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        with pytest.raises(ValueError, match=r"parameter phase .*complex64"):
            form([("real", torch.zeros(2)), ("phase", phase)])

    @each_rule
    def test_sparse_gradients_are_refused_before_anything_moves(self, rule):
        dense, rows = torch.nn.Linear(2, 3), torch.nn.Embedding(3, 2, sparse=True)
        named = [{"params": [*dense.named_parameters()]}, {"params": [("rows", rows.weight)]}]
        optimizer = build(rule, named)
        loss = dense(rows(torch.tensor([0]))).square().sum()
        loss.backward()
        before, saved = copied(weights(optimizer)), copy.deepcopy(optimizer.state_dict())
        with pytest.raises(RuntimeError, match=rf"{rule.title} does not .* sparse .* rows"):
            optimizer.step(**given_loss(rule, loss))
        assert_same(weights(optimizer), before)
        assert_same(optimizer.state_dict(), saved)

    @over([rule for rule in ALL if "loss" in rule.needs])
    def test_a_step_without_the_loss(self, rule):
        optimizer = build(rule)
        with pytest.raises(ValueError, match=r"step\(closure\)"):
            optimizer.step()

    @over([rule for rule in ALL if "loss" in rule.needs])
    def test_the_loss_is_that_of_the_closure_as_number_or_tensor(self, rule):
        def run(make):
            optimizer = build(rule, parameters(F64))
            params = optimizer.param_groups[0]["params"]
            for step in range(4):
                optimizer.zero_grad()

                def closure(step=step):
                    loss = loss_of(params, step)
                    loss.backward()
                    return make(loss)

                optimizer.step(closure)
            return weights(optimizer)

        assert_same(run(lambda loss: loss.reshape(1)), run(lambda loss: loss))
        assert_same(run(lambda loss: loss.item()), run(lambda loss: loss))

    @each_readout
    def test_a_step_with_the_weights_of_evaluation(self, rule):
        optimizer = build(rule)
        descend(optimizer, 2)
        optimizer.eval()
        before = copied(weights(optimizer))
        called = []
        with pytest.raises(RuntimeError, match=rf"{rule.title}\.train\(\)"):
            optimizer.step(lambda: called.append(1))
        assert not called
        assert_same(weights(optimizer), before)
        optimizer.train()
        descend(optimizer, 1, start=2)


class TestEvaluation:
    @each_readout
    def test_is_of_the_readout_and_comes_back(self, rule):
        optimizer = build(rule, parameters(F64))
        descend(optimizer, 4)
        (group,) = optimizer.param_groups
        trained = copied(weights(optimizer))
        values = values_in(optimizer.rule, group)
        layouts = [Layout.of({str(i): p}) for i, p in enumerate(trained)]
        parts = [[p] for p in group["params"]]
        if rule.over == "model":
            layouts, parts = [Layout.of(dict(enumerate(trained)))], [group["params"]]
        expected = []
        for layout, part in zip(layouts, parts, strict=True):
            names = optimizer.state[part[0]]
            s = {n: torch.cat([optimizer.state[p][n].reshape(-1) for p in part]) for n in names}
            s |= {n: group[n] for n in rule.slots if n in group}
            flat = torch.cat([p.detach().reshape(-1) for p in part])
            expected += layout.unflatten(flat_readout(rule, layout, flat, s, values)).values()
        optimizer.eval()
        assert_same(weights(optimizer), expected)
        optimizer.eval()
        assert_same(weights(optimizer), expected)
        optimizer.train()
        assert_same(weights(optimizer), trained)
        optimizer.train()
        assert_same(weights(optimizer), trained)

    @each_rule
    def test_is_nothing_before_the_first_step(self, rule):
        optimizer = build(rule)
        before = copied(weights(optimizer))
        optimizer.eval()
        assert_same(weights(optimizer), before)
        optimizer.train()
        assert_same(weights(optimizer), before)
        assert not optimizer.state

    @each_readout
    @pytest.mark.parametrize("kind", ["file", "deepcopy", "pickle"])
    def test_a_run_saved_in_between_goes_on(self, rule, kind):
        model = torch.nn.ParameterList(parameters())
        optimizer = build(rule, model.parameters())
        descend(optimizer, 3)
        optimizer.eval()
        if kind == "file":
            other = build(rule, parameters())
            other.load_state_dict(through_a_file(optimizer.state_dict()))
            torch._foreach_copy_(weights(other), weights(optimizer))
        elif kind == "deepcopy":
            _, other = copy.deepcopy((model, optimizer))
        else:
            _, other = pickle.loads(pickle.dumps((model, optimizer)))
        assert_same(weights(other), weights(optimizer))
        with pytest.raises(RuntimeError, match="train"):
            other.step()
        other.train()
        optimizer.train()
        assert_same(weights(other), weights(optimizer))
        assert_same(descend(other, 3, start=3), descend(optimizer, 3, start=3))

    @each_readout
    def test_a_state_dict_of_training_ends_it(self, rule):
        optimizer = build(rule)
        descend(optimizer, 3)
        saved, there = copy.deepcopy(optimizer.state_dict()), copied(weights(optimizer))
        ahead = copied(descend(optimizer, 2, start=3))
        optimizer.eval()
        optimizer.load_state_dict(saved)
        torch._foreach_copy_(weights(optimizer), there)
        optimizer.train()
        assert_same(descend(optimizer, 2, start=3), ahead)


class TestParameters:
    @each_rule
    def test_those_without_a_gradient_are_left_alone(self, rule):
        optimizer = build(rule)
        _, _, _, still = params = optimizer.param_groups[0]["params"]
        still.requires_grad_(False)
        before = still.clone()
        for step in range(3):
            optimizer.zero_grad()
            loss = loss_of(params, step)
            loss.backward()
            params[1].grad = None
            optimizer.step(**given_loss(rule, loss))
        assert torch.equal(still, before)
        assert torch.equal(params[1].detach(), noise(1, SHAPES[1]))
        assert not torch.equal(params[0].detach(), noise(0, SHAPES[0]))

    @each_rule
    def test_no_gradient_at_all_is_no_step(self, rule):
        optimizer = build(rule)
        optimizer.step(**given_loss(rule, torch.ones(())))
        assert optimizer.param_groups[0]["t"] == 0
        assert_same(weights(optimizer), [noise(i, shape) for i, shape in enumerate(SHAPES)])

    @each_rule
    def test_a_gradient_that_comes_late_is_one_of_zeros_till_then(self, rule):
        def run(early):
            given = {"weight_decay": 0.0} if "weight_decay" in rule.hypers else {}
            optimizer = build(rule, **given)
            params = optimizer.param_groups[0]["params"]
            for step in range(5):
                optimizer.zero_grad()
                loss = loss_of(params, step)
                loss.backward()
                if step < 2:
                    params[1].grad = early
                optimizer.step(**given_loss(rule, loss))
            return params[1].detach()

        late = run(None)
        assert late.isfinite().all()
        assert not torch.equal(late, noise(1, SHAPES[1]))
        # A gradient of 0 does something to these: eps is added, or the first loss is taken.
        if rule.over == "element" and rule.name not in ("adamomentum", "aegd", "aegdm"):
            torch.testing.assert_close(late, run(torch.zeros(5)))

    @each_rule
    def test_channels_last(self, rule):
        def run(memory_format):
            shapes = [(2, 3, 2, 2), (3, 2, 3, 3)]
            params = [
                torch.nn.Parameter(noise(i, shape).to(memory_format=memory_format))
                for i, shape in enumerate(shapes)
            ]
            optimizer = build(rule, params)
            for step in range(3):
                losses = [(1 - torch.cos(p.detach())).sum() + 5 for p in params]
                for i, p in enumerate(params):
                    # Gradients lie as they come: as the weights, or as they please.
                    p.grad = torch.empty_like(p).copy_(noise(10 * step + i, p.shape) + p.detach())
                    if step == 1:
                        p.grad = p.grad.contiguous()
                optimizer.step(**given_loss(rule, sum(losses)))
                assert all(p.is_contiguous(memory_format=memory_format) for p in params)
            return weights(optimizer)

        last, plain = run(torch.channels_last), run(torch.contiguous_format)
        torch.testing.assert_close(last, plain, rtol=1e-5, atol=1e-6)

    @each_rule
    def test_gradients_that_do_not_lie_in_one_piece(self, rule):
        def run(laid):
            shapes = [(3, 4), (5,), (), (4, 3, 2)]
            optimizer = build(rule, parameters(shapes=shapes))
            params = optimizer.param_groups[0]["params"]
            for step in range(3):
                for i, p in enumerate(params):
                    p.grad = laid(noise(10 * step + i, p.shape[1:]).expand(p.shape))
                optimizer.step(**given_loss(rule, torch.tensor(3.0)))
            return weights(optimizer)

        expanded, whole = run(lambda g: g), run(lambda g: g.contiguous())
        torch.testing.assert_close(expanded, whole, rtol=1e-5, atol=1e-6)

    @each_rule
    def test_no_elements(self, rule):
        shapes = [(3, 4), (0,), (0, 3), (3, 0), (2, 0, 1, 1), (5,)]
        optimizer = build(rule, parameters(shapes=shapes))
        descend(optimizer, 3)
        assert [p.shape for p in weights(optimizer)] == [torch.Size(s) for s in shapes]
        assert all(p.isfinite().all() for p in weights(optimizer))
        optimizer.eval()
        optimizer.train()
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
        descend(optimizer, 1, start=3)
        only = build(rule, parameters(shapes=[(0,)]))
        descend(only, 2)

    @each_rule
    def test_of_several_dtypes(self, rule):
        params = [
            torch.nn.Parameter(noise(i, (3,), dtype))
            for i, dtype in enumerate([torch.float32, torch.bfloat16, F64, torch.bfloat16])
        ]
        if rule.over == "model":
            groups = [{"params": [p]} for p in params]
            optimizer = build(rule, groups)
        else:
            optimizer = build(rule, params)
        for step in range(3):
            for p in params:
                p.grad = noise(step, (3,), p.dtype)
            optimizer.step(**given_loss(rule, torch.tensor(3.0)))
        assert [p.dtype for p in params] == [torch.float32, torch.bfloat16, F64, torch.bfloat16]
        assert all(p.isfinite().all() for p in params)


class TestEdits:
    """What users do to optimizer.state acts at the next step, as if it had been loaded."""

    @staticmethod
    def pair(rule, edit_loaded):
        """A run of 3 steps, and another that goes on from its edited state_dict."""
        optimizer, other = build(rule), build(rule)
        descend(optimizer, 3)
        loaded = copy.deepcopy(optimizer.state_dict())
        edit_loaded(loaded)
        other.load_state_dict(loaded)
        torch._foreach_copy_(weights(other), weights(optimizer))
        return optimizer, other

    @each_rule
    def test_in_place(self, rule):
        def edit(slots):
            for x in slots.values():
                x.mul_(0.5)

        optimizer, other = self.pair(rule, lambda d: [edit(s) for s in d["state"].values()])
        for slots in optimizer.state.values():
            edit(slots)
        assert_same(descend(optimizer, 3, start=3), descend(other, 3, start=3))

    @each_rule
    def test_new_tensors(self, rule):
        def edit(slots):
            for n, x in slots.items():
                slots[n] = x / 2

        def edit_one(loaded):
            if loaded["state"]:
                edit(loaded["state"][1])

        optimizer, other = self.pair(rule, edit_one)
        if optimizer.state:
            edit(optimizer.state[optimizer.param_groups[0]["params"][1]])
        assert_same(descend(optimizer, 3, start=3), descend(other, 3, start=3))

    @each_rule
    def test_cleared(self, rule):
        optimizer, other = self.pair(rule, lambda d: d["state"].clear())
        optimizer.state.clear()
        assert_same(descend(optimizer, 3, start=3), descend(other, 3, start=3))

    @over([rule for rule in ALL if rule.over != "model"])
    def test_one_deleted(self, rule):
        optimizer, other = self.pair(rule, lambda d: d["state"].pop(1, None))
        optimizer.state.pop(optimizer.param_groups[0]["params"][1], None)
        assert_same(descend(optimizer, 3, start=3), descend(other, 3, start=3))


def test_step_takes_the_loss_by_name():
    assert "loss" in inspect.signature(build(RULES["sgd"]).step).parameters
