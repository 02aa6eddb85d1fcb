"""The torch forms as drop-in replacements: construction, groups, schedulers, errors, copies."""

import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from hyperdescent.inner.core.hyper import learning_rate
from hyperdescent.inner.core.rule import rule
from hyperdescent.inner.registry import RULES, WRAPPERS, find_rule
from hyperdescent.inner.torch_form import optimizer as optim
from hyperdescent.inner.torch_form.optimizer import torch_form


def model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)
    ).double()


def train(net, optimizer, steps=5, scheduler=None):
    for step in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        # Only our own take it.
        optimizer.step(**({"loss": loss} if "hyperdescent" in type(optimizer).__module__ else {}))
        if scheduler:
            scheduler.step()
    return [p.detach().clone() for p in net.parameters()]


def weights_after(make, steps=5, schedule=None):
    net = model()
    optimizer = make(net.parameters())
    return train(net, optimizer, steps, schedule(optimizer) if schedule else None)


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


class TestNames:
    @pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
    def test_every_rule_is_a_class_of_the_module(self, rule):
        form = getattr(optim, rule.title)
        assert form is torch_form(rule) is getattr(optim, rule.title)
        assert issubclass(form, torch.optim.Optimizer)
        assert (form.__name__, form.__module__) == (
            rule.title,
            "hyperdescent.inner.torch_form.optimizer",
        )
        assert rule.title in dir(optim)

    def test_unknown_class_names_the_nearest(self):
        with pytest.raises(
            AttributeError, match=r"no optimizer 'Alphagrad'; did you mean 'AlphaGrad'\?"
        ):
            _ = optim.Alphagrad

    def test_chosen_options_become_the_defaults_of_a_class_of_its_own(self):
        form = torch_form(RULES["sgd"].choose(nesterov=True))
        assert form is not optim.SGD
        assert form([torch.zeros(2)], momentum=0.9).param_groups[0]["nesterov"] is True

    def test_equal_rules_have_one_class(self):
        form = torch_form("clip_norm(cautious(muon))")
        clip_norm, cautious = WRAPPERS["clip_norm"], WRAPPERS["cautious"]
        assert form is torch_form(clip_norm(cautious("muon")))
        assert form is torch_form(find_rule("clip_norm(cautious(muon))"))
        assert torch_form("adam") is optim.Adam
        others = clip_norm(cautious("muon"), max_norm=2.0), form.rule.choose(nesterov=False)
        assert len({form, *map(torch_form, others)}) == 3
        assert torch_form(others[0])([torch.zeros(2)]).param_groups[0]["max_norm"] == 2.0

    def test_a_class_nobody_uses_is_let_go(self):
        rule = find_rule("clip_value(cautious(sgd))")
        gone = weakref.ref(torch_form(rule))
        gc.collect()
        assert gone() is None and torch_form(rule).rule is rule

    def test_a_rule_that_is_not_registered_has_a_form(self):
        @rule("Descent", lr=learning_rate(0.5))
        def descent(p, g, s, t, lr):
            return p - lr * g, s

        p = torch.nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        torch_form(descent)([p]).step()
        assert torch.equal(p.detach(), torch.full((2,), 0.5))


class TestSignature:
    def test_help_shows_torchs_arguments_and_defaults(self):
        assert str(inspect.signature(optim.AdamW)) == (
            "(params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, *, "
            "maximize=False, beta1=0.9, beta2=0.999, compile=False) -> None"
        )
        assert "arXiv:1711.05101" in optim.AdamW.__doc__
        assert "weight_decay: 0.01 unless given; in [0, inf)" in optim.AdamW.__doc__

    def test_documents_what_a_scheduler_does_with_a_second_rate(self):
        optimizer = optim.Muon([torch.nn.Parameter(torch.ones(2))], lr=0.1, aux_lr=0.02)
        LambdaLR(optimizer, lambda step: 0.5)
        (group,) = optimizer.param_groups
        assert (group["lr"], group["aux_lr"]) == (0.05, 0.02)
        assert 'group["lr"] alone, and aux_lr stays where it is' in optim.Muon.__doc__
        assert 'group["aux_lr"] = ratio * group["lr"]' in optim.Muon.__doc__
        assert 'group["rest_lr"] = ' in torch_form("partition(sgd, adam)").__doc__
        assert "ratio" not in optim.AdamW.__doc__

    @pytest.mark.parametrize(
        "name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad"]
    )
    def test_order_and_defaults_are_torchs(self, name):
        ours, theirs = (inspect.signature(getattr(m, name)) for m in (optim, torch.optim))
        positional = [p for p in ours.parameters.values() if p.kind != p.KEYWORD_ONLY][1:]
        for mine, other in zip(positional, list(theirs.parameters.values())[1:], strict=False):
            assert (mine.name, mine.default) == (other.name, other.default)

    def test_positional_arguments(self):
        group = optim.AdamW([torch.zeros(2)], 0.01, (0.8, 0.9), 1e-6, 0.2).param_groups[0]
        assert [group[n] for n in ("lr", "betas", "eps", "weight_decay")] == [
            0.01,
            (0.8, 0.9),
            1e-6,
            0.2,
        ]

    @pytest.mark.parametrize("given", [{"betas": (0.8, 0.95)}, {"beta1": 0.8, "beta2": 0.95}])
    def test_betas_are_stored_as_torch_stores_them(self, given):
        group = optim.Adam([torch.zeros(2)], **given).param_groups[0]
        assert group["betas"] == (0.8, 0.95)
        assert "beta1" not in group

    def test_one_beta_alone_keeps_the_other(self):
        assert optim.Adam([torch.zeros(2)], beta2=0.95).defaults["betas"] == (0.9, 0.95)


class TestDropIn:
    def test_param_groups_have_their_own_values(self):
        def make(optimizer):
            net = model()
            first, last = net[0].parameters(), net[2].parameters()
            groups = [{"params": first, "lr": 0.1, "weight_decay": 0.0}, {"params": last}]
            return train(net, optimizer(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1))

        assert_same(make(optim.AdamW), make(torch.optim.AdamW))

    def test_a_group_may_set_one_beta(self):
        groups = [{"params": [torch.zeros(2)], "beta2": 0.9}, {"params": [torch.zeros(2)]}]
        adam = optim.Adam(groups, beta1=0.8)
        assert [g["betas"] for g in adam.param_groups] == [(0.8, 0.9), (0.8, 0.999)]
        assert "betas" not in groups[0], "the caller's dict is not touched"

    def test_groups_may_be_tagged(self):
        group = optim.Adam(
            [{"params": [torch.zeros(2)], "name": "head", "lr_scale": 2}]
        ).param_groups[0]
        assert (group["name"], group["lr_scale"]) == ("head", 2)

    def test_named_parameters(self):
        net = model()
        train(net, adam := optim.Adam(net.named_parameters()))
        assert adam.param_groups[0]["param_names"][0] == "0.weight"

    def test_edits_of_a_group_act_at_the_next_step(self):
        def make(optimizer):
            net = model()
            adam = optimizer(net.parameters(), lr=0.01)
            train(net, adam)
            adam.param_groups[0]["betas"] = (0.5, 0.9)
            adam.param_groups[0]["lr"] = 0.1
            return train(net, adam)

        assert_same(make(optim.Adam), make(torch.optim.Adam))

    @pytest.mark.parametrize(
        "schedule",
        [
            lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
            lambda o: CosineAnnealingLR(o, T_max=10),
            lambda o: OneCycleLR(o, max_lr=0.1, total_steps=12),
        ],
        ids=["LambdaLR", "CosineAnnealingLR", "OneCycleLR"],
    )
    @pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])
    def test_schedulers(self, name, schedule):
        extra = {} if name == "AdamW" else {"momentum": 0.9}
        ours, theirs = (
            weights_after(lambda p, m=m: getattr(m, name)(p, lr=0.01, **extra), 10, schedule)
            for m in (optim, torch.optim)
        )
        assert_same(ours, theirs)

    def test_closure_runs_with_gradients_and_its_loss_is_returned(self):
        p = torch.nn.Parameter(torch.ones(2))

        def closure():
            p.grad = None
            loss = p.square().sum()
            loss.backward()
            return loss

        assert optim.SGD([p], lr=0.25).step(closure) == 2
        assert torch.equal(p.detach(), torch.full((2,), 0.5))

    def test_tensor_hyperparameters(self):
        as_tensors = dict(
            lr=torch.tensor([0.25]), betas=(torch.tensor(0.5), torch.tensor(0.75)), eps=1e-6
        )
        as_numbers = dict(lr=0.25, betas=(0.5, 0.75), eps=1e-6)
        assert_same(
            weights_after(lambda p: optim.Adam(p, **as_tensors)),
            weights_after(lambda p: optim.Adam(p, **as_numbers)),
        )

    def test_tensor_hyperparameters_that_require_gradients_leave_no_graph(self):
        p = torch.nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        adam = optim.Adam([p], lr=torch.tensor(0.1, requires_grad=True))
        adam.step()
        assert p.is_leaf and not any(x.requires_grad for x in adam.state[p].values())

    def test_parameters_without_gradient_are_left_alone(self):
        moved, still = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        moved.grad = torch.ones(2)
        adam = optim.AdamW([moved, still], weight_decay=0.5)
        adam.step()
        assert torch.equal(still.detach(), torch.ones(2))
        assert still not in adam.state

    def test_a_group_without_gradients_does_not_count_the_step(self):
        moved, still = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        moved.grad = torch.ones(2)
        adam = optim.Adam([{"params": [moved]}, {"params": [still]}])
        adam.step()
        assert [float(g["t"]) for g in adam.param_groups] == [1, 0]

    def test_a_late_parameter_has_averages_of_zero_gradients(self):
        def last_weights(optimizer, early_grad):
            p, late = (torch.nn.Parameter(torch.ones(2).double()) for _ in range(2))
            adam = optimizer([p, late], lr=0.1)
            for step in range(6):
                p.grad = torch.ones(2).double()
                late.grad = early_grad if step < 3 else torch.ones(2).double()
                adam.step()
            return late.detach()

        assert_same(
            last_weights(optim.Adam, None), last_weights(torch.optim.Adam, torch.zeros(2).double())
        )

    def test_a_late_parameter_in_a_group_of_its_own_counts_from_one(self):
        def last_weights(optimizer):
            p, late = (torch.nn.Parameter(torch.ones(2).double()) for _ in range(2))
            radam = optimizer([p], lr=0.1)
            for step in range(6):
                if step == 3:
                    radam.add_param_group({"params": late})
                p.grad = late.grad = torch.ones(2).double()
                radam.step()
            return late.detach()

        assert_same(last_weights(optim.RAdam), last_weights(torch.optim.RAdam))

    def test_slots_in_bfloat16_and_the_counter_in_float64(self):
        p = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        p.grad = torch.ones_like(p)
        nadam = optim.NAdam([p])
        nadam.step()
        nadam.load_state_dict(nadam.state_dict())
        assert {n: x.dtype for n, x in nadam.state[p].items()} == {
            "m": torch.bfloat16,
            "v": torch.bfloat16,
        }
        group = nadam.param_groups[0]
        assert group["t"].dtype == group["mu_product"].dtype == torch.float64

    def test_channels_last_weights(self):
        p = torch.nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last))
        p.grad = torch.ones_like(p)
        optim.Adam([p], lr=0.1).step()
        assert p.is_contiguous(memory_format=torch.channels_last)


class TestCopies:
    @pytest.mark.parametrize(
        "copied",
        [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
        ids=["deepcopy", "pickle"],
    )
    @pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
    def test_a_copy_goes_on_alike_and_apart(self, rule, copied):
        net = model()
        optimizer = torch_form(rule)(net.parameters(), lr=0.01)
        train(net, optimizer)
        other_net, other = copied((net, optimizer))
        assert type(other) is type(optimizer)
        before = [p.detach().clone() for p in net.parameters()]
        after = train(other_net, other)
        assert all(map(torch.equal, before, net.parameters()))
        assert all(map(torch.equal, train(net, optimizer), after))

    def test_the_class_itself_can_be_pickled(self):
        assert pickle.loads(pickle.dumps(optim.NAdam)) is optim.NAdam

    def test_a_state_dict_is_a_snapshot(self):
        net = model()
        nadam = optim.NAdam(net.parameters())
        train(net, nadam)
        saved = nadam.state_dict()
        kept = copy.deepcopy(saved)
        train(net, nadam)
        for i, slots in kept["state"].items():
            assert all(torch.equal(saved["state"][i][n], x) for n, x in slots.items())
        assert torch.equal(saved["param_groups"][0]["t"], kept["param_groups"][0]["t"])

    def test_a_saved_state_dict_loads_with_weights_only_and_restores_values(self):
        net = model()
        adam = optim.Adam(net.parameters(), lr=0.02, betas=(0.8, 0.9))
        train(net, adam)
        file = io.BytesIO()
        torch.save(adam.state_dict(), file)
        file.seek(0)
        other = optim.Adam(model().parameters())
        other.load_state_dict(torch.load(file, weights_only=True))
        group = other.param_groups[0]
        assert (group["lr"], group["betas"], float(group["t"])) == (0.02, (0.8, 0.9), 5)

    def test_a_state_dict_of_torch_is_refused(self):
        theirs = torch.optim.Adam(model().parameters()).state_dict()
        with pytest.raises(ValueError, match=r"not written by hyperdescent's Adam: .* counter"):
            optim.Adam(model().parameters()).load_state_dict(theirs)


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "given", "error", "message"),
        [
            ("AdamW", {"weight_dacay": 1}, TypeError, "AdamW has no argument .* 'weight_decay'"),
            ("AdamW", {"learning_rate": 1}, TypeError, "known: beta1, beta2, betas, compile, eps,"),
            ("AdamW", {"lr": -1}, ValueError, r"lr=-1 is outside \[0, inf\); its default is 0.001"),
            ("AdamW", {"lr": float("nan")}, ValueError, "lr=nan is outside"),
            ("AdamW", {"betas": (0.9, 1.0)}, ValueError, r"beta2=1 is outside \[0, 1\)"),
            ("AdamW", {"betas": 0.9}, ValueError, r"betas=0.9 is not a tuple \(beta1, beta2\)"),
            ("AdamW", {"betas": (0.9, 0.9), "beta2": 0.9}, TypeError, "got betas and beta2; give"),
            ("AdamW", {"lr": "3"}, TypeError, "lr='3' is not a number"),
            ("AdamW", {"lr": torch.ones(3)}, ValueError, r"shape \(3,\); a param group takes one"),
            ("SGD", {"nesterov": True}, ValueError, "nesterov=True needs momentum > 0"),
            ("SGD", {"nesterov": "yes"}, ValueError, "nesterov='yes' is not one of False, True"),
            ("AlphaGrad", {"momentum": 0.9, "dampening": 0.1, "nesterov": True}, ValueError, "= 0"),
        ],
    )  # fmt: skip
    def test_illegal_arguments(self, name, given, error, message):
        with pytest.raises(error, match=message):
            getattr(optim, name)([torch.zeros(2)], **given)

    @pytest.mark.parametrize(
        ("group", "error", "message"),
        [
            ({"lr": -1}, ValueError, "lr=-1 is outside"),
            ({"beta": (0.9, 0.9)}, TypeError, "no group argument 'beta'; did you mean 'betas'"),
            ({"beta1": 2.0}, ValueError, "beta1=2 is outside"),
        ],
    )
    def test_illegal_groups_are_not_added(self, group, error, message):
        adam = optim.Adam([torch.zeros(2)])
        with pytest.raises(error, match=message):
            adam.add_param_group({"params": [torch.zeros(2)], **group})
        assert len(adam.param_groups) == 1

    def test_complex_parameters_are_refused_by_name(self):
        p = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        adam = optim.Adam([("real", torch.zeros(2))])
        with pytest.raises(ValueError, match=r"parameter phase of its group is torch\.complex64"):
            adam.add_param_group({"params": [("phase", p)]})
        assert len(adam.param_groups) == 1
        with pytest.raises(ValueError, match="parameter number 1 of its group is"):
            optim.SGD([torch.zeros(2), p])

    def test_sparse_gradients_are_refused_before_anything_moves(self):
        dense = torch.nn.Parameter(torch.ones(2))
        dense.grad = torch.ones(2)
        rows = torch.nn.Embedding(3, 2, sparse=True)
        rows(torch.tensor([0])).sum().backward()
        with pytest.raises(RuntimeError, match="Adagrad does not support sparse gradients"):
            optim.Adagrad([dense, rows.weight]).step()
        assert torch.equal(dense.detach(), torch.ones(2))

    def test_no_parameters(self):
        with pytest.raises(ValueError, match="empty parameter list"):
            optim.Adam([])
        with pytest.raises(TypeError, match="'params'"):
            optim.Adam()
