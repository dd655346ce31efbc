"""Tests against trusted references: exact arithmetic, brute force, sampling, and the effect itself in miniature.
They open with the paper in five tests. The rest follows the order of the code."""

import copy
import functools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from decimal import Decimal, localcontext
from itertools import combinations, islice, permutations, product, starmap
from math import comb, exp, inf, log, nan, prod
from pathlib import Path
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # read when PyTorch is loaded: more threads gain nothing here, and wait for others

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch.testing import assert_close

import passn
import toy_tasks
from passn import (GPT, KINDS, LOSSES, SETTINGS, answer_log_p, answer_logits, dco_loss, estimate_pass_at_n,
                   limited_policy, load_runs, main, optimal_policy, overconfidence_factor, pass_at_n, pass_at_n_weights,
                   reward_loss, sample, train)
from toy_tasks import (ATOMS, END, FIRST_TACTIC, MAX_DEPTH, PAD, TASKS, apply_tactic, draw_theorems, mask_after_end,
                       part_of, pretty, proof_p, proof_table, solve)

matplotlib.use("agg")
torch.set_num_threads(1)
ROOT = Path(passn.__file__).parent
TEXTS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "exercises" / "README.md")}
LOG_PS = [-2000, -200, -50.001, -50, -49.9, -20, -9, -4.1, -1, log(0.5), -0.1, -1e-3, -1e-6]
ONE = torch.tensor([-1.0])
TINY = {"epochs": 2, "evaluations": 2, "n_layer": 1, "n_head": 2, "n_embd": 16}
parametrize = pytest.mark.parametrize
PRECISION = parametrize("dtype, rel", [(torch.float32, 1e-5), (torch.float64, 1e-12)])


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Every task with a tiny model, few problems and two epochs, all runs in this process, in an empty folder."""
    for name, settings in SETTINGS.items():
        few = {"num_traces": 4, "resample_every": 1} if name == "cot" else {}
        monkeypatch.setitem(SETTINGS, name, settings | TINY | few)
    for name, number in {"multiply": 200, "cot": 30, "prove": 6, "search": 6}.items():
        few = functools.partial(getattr(toy_tasks, name), num_train=number, num_test=min(number, 100))
        monkeypatch.setitem(TASKS, name, few)
    monkeypatch.setattr(passn.Traces, "num_samples", {1.0: 64, 1.3: 8})
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.chdir(tmp_path)


def curve(run, name):
    return [record["test"][name] for record in run["history"]]


def gradient_of(value, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, [*parameters], retain_graph=True)])


# ---- the paper in five tests -----------------------------------------------------------------------------


@parametrize("N", [1, 2, 64, 1_000_000])
@parametrize("p", ["0", "1e-12", "1e-6", "0.015625", "0.5", "0.999999", "1"])
def test_pass_at_n_is_exact(p, N):
    with localcontext(prec=60):
        exact = float(1 - (1 - Decimal(p)) ** N)
    assert pass_at_n(float(p), N).item() == approx(exact, rel=1e-12, abs=0)


def test_one_try_is_cross_entropy_exactly():
    logits, labels = torch.randn(50, 10), torch.randint(10, (50,))
    log_p = torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    assert torch.equal(dco_loss(log_p, 1).mean(), LOSSES["ce"](log_p, 64))
    assert (overconfidence_factor(log_p, 1) == 1).all()
    assert_close(dco_loss(log_p, 1).mean(), F.cross_entropy(logits, labels))


@PRECISION
@parametrize("N", [1, 2, 8, 64, 1_000_000])
def test_gradient_is_the_factor_times_that_of_cross_entropy(N, dtype, rel):
    """Also at p = 1, where p underflows, and on both sides of log p = -50 and log(1/2), where the formulas change."""
    bounds = torch.tensor([0, -1e-38, log(0.5), -50, -1e4, -inf], dtype=dtype)
    neighbours = (torch.nextafter(bounds, end) for end in (bounds[:1], bounds[-1:]))
    log_p = torch.cat([torch.tensor(LOG_PS, dtype=dtype), bounds, *neighbours]).requires_grad_()
    loss, factor = dco_loss(log_p, N), overconfidence_factor(log_p.detach(), N)
    assert_close(gradient_of(loss.sum(), [log_p]), -factor, rtol=10 * rel, atol=1e-30)
    assert loss.min() >= 0 and loss[log_p > -1e5].isfinite().all() and factor[log_p <= -50].min() > 0.999


@parametrize("K", [2, 10, 1000])
@parametrize("N", [1, 2, 8, 64, 100_000])
def test_no_policy_beats_the_optimal_one(K, N):
    random = np.random.default_rng(K + N)
    even, peaked = np.ones(K), np.full(K, 0.05)
    for p in (random.dirichlet(even), random.dirichlet(peaked), even / K):
        best = optimal_policy(p, N)
        assert best.sum() == approx(1, abs=1e-9) and best.min() >= 0
        for rival in (p, *random.dirichlet(even, 20), *random.dirichlet(peaked, 20)):
            for share in (1, 0.1, 1e-3):
                mixed = share * rival + (1 - share) * best
                assert p @ (1 - (1 - mixed) ** N) <= p @ (1 - (1 - best) ** N) + 1e-9


def test_the_effect_in_miniature():
    """Cross-entropy's pass@64 falls as it grows confident; the limited loss's stays, and ends above all of it."""
    task = TASKS["multiply"](0, 300, 300)
    small = {"epochs": 60, "evaluations": 6, "batch_size": 25, "learning_rate": 3e-3, "n_layer": 1}
    ce, limited = (train(task, loss, 64, **small)[0] for loss in ("ce", "limited"))
    ce_64, limited_64 = curve(ce, "pass@64"), curve(limited, "pass@64")
    assert ce_64[-1] < 0.6 * max(ce_64)
    assert limited_64[-1] > max(ce_64) and limited_64[-1] > 0.85 * max(limited_64)
    assert curve(limited, "confidence")[-1] < 0.5 * curve(ce, "confidence")[-1]


# ---- 1. pass@N -------------------------------------------------------------------------------------------


def test_pass_at_n_takes_an_n_for_each_problem_and_rounding_errors_and_has_its_gradient():
    p = torch.tensor([0, 0.3, 0.3, 1, 1 + 2e-16], dtype=torch.float64, requires_grad=True)
    values = pass_at_n(p, torch.tensor([8, 1, 2, 8, 8]))
    assert values.tolist() == approx([0, 0.3, 0.51, 1, 1])
    assert gradient_of(values.sum(), [p]).tolist() == approx([8, 1, 1.4, 0, 0])


@parametrize("function, arguments, hint", [
    (pass_at_n, (1.1, 8), "probability"), (pass_at_n, (-0.1, 8), "probability"), (pass_at_n, (0.5, 0), "1 or more"),
    (estimate_pass_at_n, (10, 1, 11), "draw at least N"), (estimate_pass_at_n, (10, [0, 11], 2), "0 to 10"),
    (estimate_pass_at_n, (10, -1, 2), "0 to 10"), (pass_at_n_weights, (10, 0.5, 1), "whole"),
    (dco_loss, (ONE, nan), "1 or more"), (dco_loss, (-ONE, 64), "sign"), (reward_loss, (ONE[:0], 8), "empty"),
    (overconfidence_factor, (ONE, inf), "1 or more"), (limited_policy, ([1, nan], 8), "from 0 on"),
    (optimal_policy, ([2, -1], 8), "from 0 on"), (optimal_policy, ([0, 0], 8), "from 0 on")])
def test_what_cannot_be_is_refused(function, arguments, hint):
    with pytest.raises(ValueError, match=hint):
        function(*arguments)


# ---- 2. the loss -----------------------------------------------------------------------------------------


@functools.cache
def exact_loss_and_factor(log_p, N):
    with localcontext(prec=1000, Emin=-10**9, Emax=10**9):
        p = Decimal(log_p).exp()
        fail = (1 - p) ** (N - 1)
        success = 1 - fail * (1 - p)
        return float(-success.ln()), float(N * p * fail / success)


@PRECISION
def test_loss_and_factor_match_exact_arithmetic_and_a_table_made_by_other_code(dtype, rel):
    rows = [(N, log_p, *exact_loss_and_factor(log_p, N)) for N in (1, 2, 8, 64, 1000, 1_000_000)
            for log_p in torch.tensor(LOG_PS).tolist()]  # rounded to float32
    table = ROOT.parent / "shared" / "reference" / "dco_loss.csv"  # where it is at hand
    rows += np.loadtxt(table, delimiter=",", skiprows=1).tolist() if table.exists() else []
    N, log_p, *exact = torch.tensor(rows, dtype=torch.float64).T
    for function, want in zip((dco_loss, overconfidence_factor), exact):
        got = function(log_p.to(dtype), N)
        assert got.dtype == dtype and function(torch.empty(0), 8).shape == (0,)
        assert (got[want == 0].double() < 1e-59).all()  # the table's 60 digits cannot tell these from 0
        assert got[want > 0].tolist() == approx(want[want > 0].tolist(), rel=rel, abs=torch.finfo(dtype).tiny)


@PRECISION
@parametrize("N", [1, 64, 1_000_000])
def test_reward_loss_is_minus_log_of_the_mean(N, dtype, rel):
    log_p = torch.tensor([-0.1, -4.0, -9.0, -30.0], dtype=dtype)
    mean = pass_at_n(log_p.double().exp(), N).mean().item()
    assert reward_loss(log_p, N).item() == approx(-log(mean), rel=rel, abs=1e-15)
    hard = torch.tensor([-2000.0, -1999.0], dtype=dtype, requires_grad=True)  # p itself underflows
    loss = reward_loss(hard, N)
    assert loss.item() == approx(1999 - log(N * (1 + exp(-1)) / 2), rel=rel)
    assert_close(gradient_of(loss, [hard]), -hard.detach().softmax(0), rtol=0, atol=1e-4)


@parametrize("n, N", [(1, 1), (4, 1), (5, 3), (6, 6), (300, 64)])
def test_estimates_of_pass_at_n_and_of_its_gradient_are_unbiased(n, N):
    """Over all outcomes of n tries with success probability p; the gradient is that with respect to log p."""
    p, c = 0.07, torch.arange(n + 1)
    chance = torch.tensor([comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)], dtype=torch.float64)
    assert (chance @ estimate_pass_at_n(n, c, N)).item() == approx(1 - (1 - p) ** N, rel=1e-11)
    assert (chance @ (c * pass_at_n_weights(n, c, N))).item() == approx(N * p * (1 - p) ** (N - 1), rel=1e-11)


def test_weights_are_those_of_pass_at_k_with_the_leave_one_out_baseline():
    """By enumeration (Walder and Karkhanis 2025): the share of the sets of N tries with one right try that need it."""
    assert pass_at_n_weights(10, [0, 1, 10], 1).tolist() == [0, 1 / 10, 1 / 10]
    for n, c, N in ((4, 2, 2), (6, 1, 3), (7, 3, 4), (5, 5, 2)):  # tries 0 to c - 1 are right
        needed = [min(others) >= c for others in combinations(range(1, n), N - 1)]
        assert pass_at_n_weights(n, c, N).item() == approx(N / n * np.mean(needed), rel=1e-12, abs=1e-15)


# ---- 3. the model ----------------------------------------------------------------------------------------


def small_model(vocab_size=7, block_size=12, n_layer=1, n_embd=16):
    """Random weights, large enough that the answers are far from uniform."""
    torch.manual_seed(0)
    model = GPT(vocab_size, block_size, n_layer, 2, n_embd)
    for parameter in model.parameters():
        parameter.data *= 5 if parameter.dim() == 2 else 1
    return model


def test_logits_and_gradients_are_those_of_a_plain_gpt_with_torchs_own_attention():
    """All logits at once, the last ones alone, and one after the other with a cache."""
    model, tokens = small_model(n_layer=3, n_embd=32), torch.randint(7, (5, 12))
    x = model.token_embedding(tokens) + model.position_embedding.weight
    for block in model.blocks:
        normed = block.ln_1(x)
        qkv = block.query(normed), *block.key_value(normed).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (block.n_head, -1)).transpose(1, 2) for t in qkv)
        x = x + block.projection(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    plain, last = model.head(model.ln(x)), model(tokens, last=4)
    cache = torch.full((3, 2, 5, 2, 12, 16), torch.nan)  # a position read before it is written would show
    with torch.no_grad():
        steps = [model(tokens[:, :6], cache=cache)]
        steps += [model(tokens[:, i:i + 1], cache=cache, start=i) for i in range(6, 12)]
    for ours, theirs in ((model(tokens), plain), (last, plain[:, -4:]), (torch.cat(steps, dim=1), plain)):
        assert_close(ours, theirs, rtol=0, atol=1e-5)
    one, other = (gradient_of(logits.square().sum(), model.parameters()) for logits in (last, plain[:, -4:]))
    assert_close(one, other, rtol=1e-4, atol=1e-5 * one.abs().max().item())


# ---- 4. from a model to p --------------------------------------------------------------------------------


def agree(shares, p, draws):
    """Whether shares of so many draws are p, within four standard errors."""
    return ((shares - p).abs() < 4 * (p * (1 - p) / draws).sqrt() + 1e-9).all()


@torch.no_grad()
@parametrize("temperature", [1.0, 1.6])
def test_exact_p_and_pass_at_n_agree_with_sampling(temperature):
    """Answers end with END, or where there is no more room; what is sampled after END does not count."""
    model, draws, N = small_model(), 20_000, 8
    prompts = torch.randint(2, 7, (5, 5))
    answers = torch.tensor([[2, 3], [4, END], [5, 5], [END, PAD], [2, 2]])
    p = answer_log_p(answer_logits(model, prompts, answers), answers, temperature).exp()
    drawn = sample(model, prompts.repeat_interleave(draws, 0), 2, temperature)
    right = (mask_after_end(drawn).view(5, draws, 2) == answers[:, None]).all(-1).double()
    assert agree(right.mean(1), p, draws)
    assert agree(right.view(5, -1, N).amax(2).mean(1), pass_at_n(p, N), draws / N)


def measured_by(kind, model, prompts, answers, temperature):
    task = toy_tasks.Task("", "", 0, [], 0, (prompts, answers), (prompts, answers), answer_length=1)
    return kind(task, {"N": 8, "tries": 8}, 0, "cpu").measure(model, "test", [temperature])[temperature]


@torch.no_grad()
def test_confidence_is_the_probability_of_the_greedy_answer():
    model, prompts = small_model(n_layer=3, n_embd=32), torch.randint(2, 7, (40, 5))
    _, confidence, _ = measured_by(passn.Answers, model, prompts, prompts[:, :3], 1.0)
    for prompt, got in zip(prompts, confidence):
        tokens, p = prompt, 1.0
        while len(tokens) < 8 and tokens[-1] != END:  # by hand: the likeliest token after the likeliest token …
            best = model(tokens[None])[0, -1].softmax(0).max(0)
            tokens = torch.cat([tokens, best.indices[None]])
            p *= best.values if best.indices != PAD else 1
        assert got.item() == approx(float(p), abs=1e-5)


@torch.no_grad()
@parametrize("temperature", [1.0, 1.6])
def test_sampled_traces_agree_with_the_sum_over_all_traces(temperature, monkeypatch):
    model, draws = small_model(vocab_size=5), 20_000
    prompts, answers = torch.randint(5, (4, 3)), torch.randint(5, (4, 3))
    every = torch.cartesian_prod(*[torch.arange(5)] * 3).repeat(4, 1)  # 125 traces for each of 4 prompts
    logits = answer_logits(model, prompts.repeat_interleave(125, 0), every) / temperature
    p = torch.log_softmax(logits, -1).gather(2, every[..., None]).sum(1).exp().view(4, 125).double()
    greedy = sample(model, prompts, 3, temperature=0)
    exact, of_greedy = ((p * (every[:125, -1] == one[:, -1:])).sum(1) for one in (answers, greedy))
    monkeypatch.setattr(passn.Traces, "num_samples", {temperature: draws})
    shares, confidence, number = measured_by(passn.Traces, model, prompts, answers, temperature)
    assert agree(shares, exact, draws) and agree(confidence, of_greedy, draws)
    means = passn.means(shares, confidence, number, [8, draws + 1])
    assert {*means} == {"pass@8", "confidence"}  # there is no pass@N for more tries than samples
    assert means["pass@8"] == approx(pass_at_n(exact, 8).mean().item(), abs=0.02)


def kind_of(task, **changes):
    torch.manual_seed(0)
    kind = KINDS[task.kind](task, SETTINGS[task.name] | TINY | changes, 0, "cpu")
    return kind, kind.new_model()


def test_a_traces_p_is_the_given_one_and_the_share_of_other_right_ones(monkeypatch):
    """Of four sampled traces one is the given one, one is another that is right, and two are wrong."""
    task = TASKS["cot"](0, 20, 5)
    kind, model = kind_of(task, num_traces=4, resample_every=2)
    prompts, given = task.train
    other, wrong = given.clone(), given.clone()
    other[:, 0], wrong[:, -1] = (other[:, 0] + 1) % 16, (wrong[:, -1] + 1) % 16
    sampled = torch.stack([given, other, wrong, wrong], dim=1).flatten(0, 1)
    monkeypatch.setattr(passn, "sample", lambda *_: sampled)
    batch = torch.tensor([3, 1, 4])
    exact = answer_log_p(answer_logits(model, prompts[batch], given[batch]), given[batch])
    for N, epoch, share in ((1, 0, 0), (64, 1, 0), (64, 2, 0.25)):  # cross-entropy, and an odd epoch, sample none
        kind.new_epoch(model, epoch, N)
        log_p = kind.log_p(model, batch)
        assert_close(log_p.exp(), exact.exp() + share)
        one, other = (gradient_of(value.sum(), model.parameters()) for value in (log_p, exact))
        assert_close(one, other)  # it pulls on the given trace all the same


def test_a_steps_p_is_that_of_its_theorem_and_pulls_on_the_step():
    task = TASKS["prove"](0, 6, 3)
    batch, (theorem, row, tactic) = torch.arange(len(task.steps)), task.steps.T
    kind, model = kind_of(task)
    policy = passn.tactic_logits(model, task.train).softmax(dim=1)
    steps = policy[row, tactic].log()
    kind.new_epoch(model, 0, 64)
    log_p = kind.log_p(model, batch)
    assert_close(log_p, proof_p(policy, task.train)[theorem].log())
    one, other = (gradient_of(value.sum(), model.parameters()) for value in (log_p, steps))
    assert_close(one, other)
    for N, per_step in ((1, False), (4, True)):
        kind, model = kind_of(task, per_step=per_step)
        kind.new_epoch(model, 0, N)
        assert_close(kind.log_p(model, batch), steps)


@parametrize("N", [1, 64])
def test_the_sampled_gradient_tends_to_the_exact_one(N):
    """That of pass@N by REINFORCE, against autograd through the exact p: in direction and in length."""
    kind, model = kind_of(TASKS["search"](1, 8, 1), reinforce=4096)
    batch = torch.arange(8)
    exact = gradient_of(pass_at_n(kind.log_p(model, batch).exp(), N).mean(), model.parameters())
    mean = -sum(kind.objective(model, batch, "reward", N) for _ in range(3)) / 3
    sampled = gradient_of(mean, model.parameters())
    assert F.cosine_similarity(exact, sampled, dim=0) > 0.99
    assert (sampled @ exact / (exact @ exact)).item() == approx(1, abs=0.15)


# ---- the tasks -------------------------------------------------------------------------------------------


def texts(task, tokens):
    return ["".join(task.vocab[token] for token in row if token != PAD) for row in tokens.tolist()]


@parametrize("name", ["multiply", "cot"])
def test_products_are_right_and_no_pair_of_factors_comes_twice(name):
    task, again, other = (TASKS[name](seed, 700, 500) for seed in (3, 3, 4))
    assert all(map(torch.equal, task.train, again.train)) and not torch.equal(task.test[0], other.test[0])
    pairs, orders = set(), Counter()
    for prompts, answers in (task.train, task.test):
        for prompt, answer in zip(texts(task, prompts), texts(task, answers)):
            a, b = map(int, re.fullmatch(r"(\d\d)\*(\d\d)[=:]", prompt).groups())
            pairs.add(frozenset((a, b)))
            assert answer[-4:] == f"{a * b:04d}"
            if name == "cot":
                first, second, total = map(int, re.split(r"[+=]", answer))
                assert first + second == total and {first, second} == {a * (b % 10), a * (b - b % 10)}
                orders[first == a * (b % 10)] += 1
    assert len(pairs) == 1200 and (name == "multiply" or min(orders.values()) > 300)


# ---- theorems and proofs ---------------------------------------------------------------------------------


def small_theorem(pick, atoms="ab", hypotheses=3):
    def formula(depth):
        return pick.choice(atoms) if depth == 0 or pick.random() < 0.4 else (formula(depth - 1), formula(depth - 1))
    return tuple(dict.fromkeys(formula(2) for _ in range(hypotheses))), formula(2)


def value(formula, truth):
    return truth[formula] if isinstance(formula, str) else value(formula[1], truth) or not value(formula[0], truth)


def type_of(steps, variables):
    """The type of the lambda term that a proof's steps spell, in the simply typed lambda calculus, which knows nothing
    of tactics: `intro` is a lambda, `apply k` applies variable k to as many arguments as make its type the goal's."""
    (_, goal), tactic = next(steps)
    if tactic == 0:
        kind = goal[0]
        return kind, type_of(steps, variables if kind in variables else (*variables, kind))
    kind = variables[tactic - 1]
    while kind != goal:
        premise, kind = kind
        assert type_of(steps, variables) == premise
    return kind


def test_what_the_kernel_proves_is_true_and_a_typed_lambda_term():
    pick, proved = random.Random(0), 0
    truths = [dict(zip(ATOMS, bits)) for bits in product([False, True], repeat=len(ATOMS))]
    for i in range(2000):
        hypotheses, goal = theorem = small_theorem(pick, "abc", 4) if i % 2 else toy_tasks.random_theorem(pick)
        length, _, blind = solve(theorem)
        assert (length < inf) == (blind > 0)
        if blind:
            proved += 1
            proof = toy_tasks.shortest_proof(theorem)
            assert len(proof) == length and type_of(iter(proof), hypotheses) == goal
            assert all(value(goal, truth) or not all(value(h, truth) for h in hypotheses) for truth in truths)
    assert proved > 500


def derivable(hypotheses, goal):
    """Natural deduction by brute force: all sequents over the theorem's subformulas, until nothing new follows."""
    def parts(formula):
        return {formula} if isinstance(formula, str) else {formula}.union(*map(parts, formula))
    universe = set().union(*map(parts, (*hypotheses, goal)))
    contexts = {frozenset({*hypotheses, *c}) for n in range(len(universe) + 1) for c in combinations(universe, n)}
    known = {(c, formula) for c in contexts for formula in c}
    implications = [(c, f, *f) for c in contexts for f in universe if not isinstance(f, str)]
    while True:
        new = {(c, f) for c, f, premise, conclusion in implications if (c | {premise}, conclusion) in known}
        new |= {(c, conclusion) for c, f, premise, conclusion in implications if {(c, f), (c, premise)} <= known}
        if new <= known:
            return (frozenset(hypotheses), goal) in known
        known |= new


def test_the_kernel_proves_what_can_be_derived_and_nothing_else():
    pick, counts = random.Random(1), Counter()
    peirce = (), ((("a", "b"), "a"), "a")  # true by truth table, but not provable without the excluded middle
    for theorem in [peirce, *(small_theorem(pick, hypotheses=2) for _ in range(300))]:
        provable = derivable(*theorem)
        assert (solve(theorem, 12)[0] < inf) == provable, theorem
        counts[provable] += 1
    assert min(counts.values()) > 50 and not derivable(*peirce)


def random_policy(table, logits):
    return torch.softmax(logits.masked_fill(~table.applicable, -torch.inf), -1)


@pytest.fixture(scope="module")
def proofs():
    """Twelve theorems, and the logits of a random policy for their states."""
    table = proof_table(draw_theorems(5, 12, 0)[0])
    torch.manual_seed(0)
    return table, 2 * torch.randn(table.applicable.shape, dtype=torch.float64)


def all_proofs(state, policy_of, depth):
    """Every proof of a state as its probability, by enumeration."""
    for tactic, left in toy_tasks.tactics(state).items() if depth else ():
        for parts in product(*(all_proofs(part, policy_of, depth - 1) for part in left)):
            yield policy_of(state, tactic) * prod(parts)


@parametrize("numbers", [[3], [7, 0, 7, 2], [*range(12)]])
def test_p_and_its_gradient_are_those_of_the_sum_over_all_proofs(numbers, proofs):
    """From the part of the table that the theorems need; where a theorem's proofs are few."""
    table, logits = proofs
    part, rows = part_of(table, torch.tensor(numbers)), sorted(set().union(*(table.reach[i] for i in numbers)))
    assert torch.equal(part.prompts, table.prompts[rows])
    logits, row = logits[rows].requires_grad_(), {table.states[r]: i for i, r in enumerate(rows)}
    policy, checked = random_policy(part, logits), 0
    policy_of = lambda state, tactic: policy[row[state], FIRST_TACTIC + tactic]
    for p, theorem in zip(proof_p(policy, part), table.theorems[numbers]):
        products = [*islice(all_proofs(table.states[theorem], policy_of, MAX_DEPTH), 1000)]
        if len(products) < 1000:
            checked += 1
            assert_close(p, sum(products))
            assert_close(gradient_of(p, [logits]), gradient_of(sum(products), [logits]))
    assert checked >= len(numbers) / 2


def proves(state, proof):
    """Whether nested tuples, such as ("4", ("1",), ("intro", ("2",))), are a proof, by the kernel."""
    name, *parts = proof
    subgoals = apply_tactic(state, 0 if name == "intro" else int(name))
    return len(subgoals) == len(parts) and all(map(proves, subgoals, parts))


def test_sampled_attempts_succeed_as_often_as_they_should_and_prove(proofs):
    """All at once for training, and one by one as text, of the three theorems with the largest p."""
    table, policy = proofs[0], random_policy(*proofs)
    p = proof_p(policy, table)
    is_proved, _ = toy_tasks.sample_attempts(policy.log(), table, 3000)
    assert is_proved.shape == (12, 3000) and agree(is_proved.double().mean(dim=1), p, 3000)
    rows = table.theorems[p.topk(3).indices]
    shown = toy_tasks.show_attempts(policy, table._replace(theorems=rows), 500, None)
    assert agree(torch.tensor([num_proved for _, num_proved, _ in shown]) / 500, p.topk(3).values, 500)
    for (theorem, num_proved, attempts), row in zip(shown, rows):
        assert theorem.endswith(f"⊢ {pretty(table.states[row][1])}") and num_proved == 500 - attempts.count("no proof")
        for text in {*attempts} - {"no proof"}:  # "4(1, intro(2))"
            nested = eval(re.sub(r"(\w+)(\(?)", lambda m: f"('{m[1]}', " + ")" * (not m[2]), text))
            assert proves(table.states[row], nested)


def descend(loss, size):
    """The logits at a loss's minimum."""
    def closure():
        optimizer.zero_grad()
        value = loss(logits)
        value.backward()
        return value
    logits = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe")
    optimizer.step(closure)
    return logits.detach()


def test_each_n_wins_at_its_own_budget_on_theorems_solved_by_hand():
    """Goal c from a→c and b→c, and nine times in ten from a, else from b, which the policy cannot see: it chooses a→c
    with probability q. So p is q nine times and 1 - q once: N = 1 tends to q = 0.9, N = 8 to where the theory says."""
    table = proof_table([((("a", "c"), ("b", "c"), atom), "c") for atom in "ab"])
    often, reached = torch.tensor([0] * 9 + [1]), {}
    p_of = lambda logits: proof_p(random_policy(table, logits.expand(table.applicable.shape)), table)
    for N in (1, 8):
        p = p_of(descend(lambda logits: LOSSES["limited"](p_of(logits)[often].log(), N), table.applicable.shape[1]))
        assert p.tolist() == approx(limited_policy([0.9, 0.1], N), abs=1e-3)
        reached[N] = {n: pass_at_n(p[often], n).mean().item() for n in (1, 8)}
    assert reached[1][1] > reached[8][1] + 0.1 and reached[8][8] > reached[1][8] + 0.01


def test_blind_search_and_the_greedy_attempt_by_the_same_recursion(proofs):
    table, _ = proofs
    uniform = table.applicable / table.applicable.sum(1, keepdim=True).double()
    assert_close(proof_p(uniform, table), table.blind, rtol=1e-9, atol=0)
    sure = F.one_hot(uniform.argmax(1), uniform.shape[1]).double()
    assert proof_p(sure, table, failure=1.0).tolist() == [1.0] * 12


def test_theorems_are_hard_distinct_and_the_same_for_the_same_seed():
    """No two are the same up to the names of their atoms and the order of their hypotheses."""
    (train_set, test_set), again, other = (draw_theorems(seed, 15, 5) for seed in (3, 3, 4))
    assert (train_set, test_set) == again != other and len(test_set) == 5
    namings, forms = [str.maketrans(ATOMS, "".join(order)) for order in permutations(ATOMS)], set()
    for theorem in train_set + test_set:
        assert 0 < solve(theorem)[2] <= toy_tasks.MAX_BLIND
        *hypotheses, goal = map(pretty, (*theorem[0], theorem[1]))
        forms.add(min((goal.translate(new), *sorted(h.translate(new) for h in hypotheses)) for new in namings))
    assert len(forms) == 20


def test_the_model_reads_all_of_a_state():
    hypothesis = ("a", "b"), ("c", "d")
    assert "".join(toy_tasks.state_tokens(((hypothesis, "a"), ("b", "d")))) == "(ab)cd1a2⊢bd"
    assert pretty(hypothesis) == "(a→b)→c→d"


# ---- MATH ------------------------------------------------------------------------------------------------


@parametrize("solution, content, integer", [
    (r"$\boxed{-12}$ is it", "-12", "-12"), (r"first \boxed{1}, then \boxed{2}", "2", "2"), (r"\fbox{42}", "42", "42"),
    (r"$\boxed{\frac{1}{\sqrt{2}}}$", r"\frac{1}{\sqrt{2}}", None), (r"so $\boxed -7 $", "-7", "-7"), ("", None, None),
    (r"$\boxed{007}$", "007", "7"), (r"$\boxed{1000}$", "1000", None), (r"\boxed{$11$}", "$11$", "11"),
    (r"$\boxed{3.5}$", "3.5", None), (r"$\boxed{3", None, None), (r"\boxed", "", None)])
def test_answers_are_read_from_the_last_box(solution, content, integer):
    assert toy_tasks.boxed(solution) == content and toy_tasks.integer_answer(solution) == integer


def problem(question, answer):
    return {"problem": question, "level": "Level 1", "type": "Algebra", "solution": f"It is $\\boxed{{{answer}}}$."}


MATH = {"train": [problem("What is $1+1$?", 2), problem("What is $2+3$?", 5), problem("Find $x$ in $x=2$.", 2),
                  problem("[asy] a picture [/asy]", 3), problem("word " * 65, 4), problem("A half?", r"\frac12")],
        "test": [problem("What is $3-1$?", 2), problem("What is $-3-4$?", -7), problem("Unheard of: 2+3?", 5)]}


@pytest.fixture
def math_dir(tmp_path):
    for split, problems in MATH.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, problems)) + "\n")
    return tmp_path


def test_math_keeps_short_questions_with_integer_answers(math_dir):
    task = TASKS["math"](0, math_dir)
    assert texts(task, task.train[1]) == ["2<end>", "5<end>", "2<end>"]
    assert texts(task, task.test[1]) == ["2<end>", "-7<end>", "5<end>"]
    assert texts(task, task.train[0])[0] == "Whatis$1+1$?" and "<unk>" in texts(task, task.test[0])[2]
    assert task.train[1][0].tolist()[1:] == [END, PAD, PAD, PAD]
    guessed = passn.guess_pass_at_n(task, lambda p, N: p, 2)  # 2 is right in 2/3, 5 in 1/3, -7 never
    assert guessed == approx((8 / 9 + 0 + 5 / 9) / 3)


def test_math_reads_the_original_release_and_the_datasets_package_alike(math_dir, tmp_path, monkeypatch):
    for split, problems in MATH.items():
        folder = tmp_path / "release" / split / "algebra"
        folder.mkdir(parents=True)
        for i, example in enumerate(problems, 1):
            (folder / f"{i * 5}.json").write_text(json.dumps(example))
    load_dataset = lambda name, subject, split: MATH[split] if subject == "algebra" else []
    monkeypatch.setitem(sys.modules, "datasets", Mock(load_dataset=load_dataset))
    expected = TASKS["math"](0, math_dir)
    for task in (TASKS["math"](0, tmp_path / "release"), TASKS["math"](0)):
        assert task.vocab == expected.vocab and task.data == expected.data
        assert all(map(torch.equal, (*task.train, *task.test), (*expected.train, *expected.test)))


# ---- 5. training -----------------------------------------------------------------------------------------


def without_times(run):
    return json.loads(json.dumps(run | {"history": [record | {"seconds": 0} for record in run["history"]]}))


@parametrize("name, changes", [("multiply", {}), ("cot", {}), ("prove", {}), ("search", {"reinforce": 4})])
def test_same_seed_same_run(name, changes, tiny):
    task, loss = TASKS[name](0), "reward" if "reinforce" in changes else "limited"
    runs = [without_times(train(task, loss, 4, seed, **changes)[0]) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_a_run_is_as_described(tiny):
    run, _ = train(TASKS["multiply"](0), "limited", 50, out="new folder", epochs=3, evaluations=3)
    path, = Path("new folder").iterdir()
    assert path.name == "multiply-limited-N50-epochs=3-evaluations=3-seed0.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(run))
    assert run["label"] == "limited N=50, epochs=3, evaluations=3"
    assert {"task", "loss", "N", "seed", "label", "config", "history", "problems", "rivals", "example"} <= {*run}
    assert [record["updates"] for record in run["history"]] == [0, 2, 4, 6]
    last, problems = run["history"][-1], run["problems"]
    assert last["epoch"] == 3 and 0 < run["history"][1]["seconds"] <= last["seconds"]
    for n in (1, 8, 50, 64, 512):
        assert last["test"][f"pass@{n}"] == approx(pass_at_n(problems["p"], n).mean().item())
    assert last["test"]["confidence"] == approx(np.mean(problems["confidence"]))
    assert {*last["tempered"]} == {f"{T:g}" for T in passn.TEMPERATURES} and last["tempered"]["1"] == last["test"]
    assert pass_at_n(problems["best"]["p"], 64).mean().item() == approx(max(curve(run, "pass@64")))


@parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
@parametrize("name", ["multiply", "cot", "prove", "search"])
def test_one_problem_is_enough(name, device, tiny):
    run, _ = train(TASKS[name](0, num_train=3, num_test=1), "limited", 1_000_000, device=device)
    assert 0 <= curve(run, "pass@64")[-1] <= 1
    assert ("pass@1000000" in run["history"][-1]["test"]) == (name != "cot")
    assert len(run["example"]) == 1 and len(run["example"][0][2]) == 64
    shapes = {"length", "branching", "blind"} if name in ("prove", "search") else set()
    assert {key for key, values in run["problems"].items() if len(values) == 1} == {"p", "confidence"} | shapes


def test_the_learning_rate_rises_over_a_twentieth_of_training_and_falls_to_a_tenth():
    rates = [passn.schedule(i / 1000) for i in range(1001)]
    assert (rates[0], max(rates), rates.index(max(rates)), rates[-1]) == approx((0.01, 1, 50, 0.1), rel=0.02)


def test_solved_examples_are_passed_over_and_batches_filled_up(tiny, monkeypatch):
    """F(64, p) falls below 0.1 between p = 3.4/64 and 3.8/64. Where half of the examples are beyond, each step sees a
    full batch of the others, and there are half as many; where all are, there is none."""
    def log_p(kind, model, batch):
        seen.extend([batch] * torch.is_grad_enabled())
        return torch.where(batch % 2 == 0, p["even"], p["odd"]).log() + 0 * model.head.weight.sum()

    def updates(loss="limited", N=64, **changes):
        settings = {"epochs": 4, "batch_size": 20, "evaluations": 1} | changes
        return train(TASKS["multiply"](0), loss, N, **settings)[0]["history"][-1]["updates"]

    p, seen = {"even": 3.8 / 64, "odd": 3.4 / 64}, []
    monkeypatch.setattr(passn.Answers, "log_p", log_p)
    assert updates() == len(seen) == 20 and all(len(batch) == 20 and (batch % 2 == 1).all() for batch in seen)
    assert updates("ce") == updates(N=1) == updates(pass_over=0.0) == updates("reward") == 40  # over none
    p["odd"] = p["even"]
    assert updates() == 0


def test_training_that_diverges_says_so_and_costs_neither_what_was_measured_nor_another_run(tiny, monkeypatch, capsys):
    monkeypatch.setitem(LOSSES, "ce", lambda log_p, N: nan * log_p.sum())
    assert main(["--task", "cot"]) == 2 and is_drawn("out/cot.png", 1) and [*Path("out").glob("cot-ce-*.partial")]
    said = capsys.readouterr()
    assert "diverged: try a smaller" in said.err and "limited N=64" in said.out and "cross-entropy" not in said.out


@parametrize("name, losses, changes", [
    ("prove", ("ce", "limited"), {"epochs": 25, "batch_size": 25, "n_embd": 48}),
    ("search", ("reward", "reward"), {"epochs": 7, "batch_size": 4, "learning_rate": 1e-2, "reinforce": 64})])
def test_the_disease_and_the_cure_on_proofs(name, losses, changes):
    """Of imitation, and of reinforcement learning from sampled attempts: N = 1, and N = 64."""
    task, small = TASKS[name](1, 28, 28), {"seed": 1, "n_layer": 1, "n_embd": 32, "evaluations": 5} | changes
    runs = [train(task, loss, N, **small)[0] for loss, N in zip(losses, (1, 64))]
    (one, many), (sure, unsure) = ([curve(run, name) for run in runs] for name in ("pass@64", "confidence"))
    assert one[-1] < 0.9 * max(one) and max(one) > 1.3 * pass_at_n(task.test.blind, 64).mean()  # it learned, too
    assert many[-1] > 0.9 * max(many) and many[-1] > 1.15 * one[-1] and unsure[-1] < 0.75 * sure[-1]


# ---- 6. theory -------------------------------------------------------------------------------------------


def test_policies_at_their_limits():
    p = [0.5, 0.3, 0.2, 0]
    assert optimal_policy(p, 1).tolist() == [1, 0, 0, 0] and optimal_policy([2, 2, 1], 1) == approx([0.5, 0.5, 0])
    assert optimal_policy(p, 1_000_000) == approx([1 / 3, 1 / 3, 1 / 3, 0], abs=1e-5)
    assert limited_policy(p, 1) == approx(p) and limited_policy(p, 64)[3] == 0


@parametrize("N", [2, 8, 64, 100_000])
@parametrize("p", [[0.5, 0.5], [1 - 1e-9, 1e-9], [0.6, 0.4, 1e-6], *np.random.default_rng(0).dirichlet(np.ones(30), 3)])
def test_policies_meet_their_kkt_conditions(p, N):
    """Answers that are kept gain equally, and none that is given up would gain more. The limited loss gives none up."""
    for policy in (optimal_policy, limited_policy):
        q = policy(p, N)
        log_fail = np.log1p(-np.minimum(q, 1 - 1e-15))
        gain = np.log(p) + (N - 1) * log_fail
        if policy is limited_policy:
            gain -= np.log(-np.expm1(N * log_fail))
            assert q.min() > 0
        kept = gain[q > 1e-12]
        assert q.sum() == approx(1, abs=1e-9) and q.min() >= 0
        assert q.max() > 1 - 1e-6 or (np.ptp(kept) < 1e-4 and gain.max() < kept.min() + 1e-4)


@parametrize("N", [1, 2, 64, 512])
def test_the_one_parameter_picture_is_pass_at_n_of_a_favourite_and_the_rest(N):
    spread = lambda x: np.array([x] + [(1 - x) / 499] * 499)
    for c in (0, 1e-4, 0.3, 1):
        assert passn.confident_pass_at_n(c, N, 0.1, 500).item() == approx(spread(0.1) @ (1 - (1 - spread(c)) ** N))


@parametrize("loss, policy", [("ce", lambda p, N: p), ("limited", limited_policy), ("reward", optimal_policy)])
@parametrize("N", [2, 8])
def test_descent_on_bare_logits_ends_where_the_theory_says(loss, policy, N):
    """A hundred problems alike, whose labels come as often as p says, and one row of logits for all of them."""
    counts = torch.tensor([50, 25, 15, 8, 2])
    labels = torch.arange(5).repeat_interleave(counts)
    logits = descend(lambda logits: LOSSES[loss](logits.log_softmax(0)[labels], N), 5)
    assert logits.softmax(0).tolist() == approx(policy(counts / 100, N), abs=2e-3)


# ---- 7. tables and figures -------------------------------------------------------------------------------


def is_drawn(path, num_colors=2):
    """Whether a figure holds the colours of so many lines."""
    pixels = plt.imread(path)[..., :3]
    return all((abs(pixels - matplotlib.colors.to_rgb(color)).max(axis=-1) < 0.01).sum() > 20
               for color in passn.COLORS[:num_colors])


def test_main_trains_saves_and_reports_every_saved_run(tiny, capsys):
    assert main("--loss limited --epochs 12".split()) == 0
    assert main("--loss ce --epochs 12 --tries 10 --seeds 2".split()) == 0 and is_drawn("out/multiply.png")
    *ce, limited = (json.loads(Path(f"out/multiply-{name}.json").read_text()) for name in (
        "ce-N1-epochs=12-seed0", "ce-N1-epochs=12-seed1", "limited-N64-epochs=12-seed0"))
    table, tries = capsys.readouterr().out.split("Figure")[-1].split("64 tries at the first three test problems:\n")
    ce_row, limited_row = table.splitlines()[-2:]
    assert limited_row.startswith("limited N=64, epochs=12 ") and " nan" in limited_row and "±" not in limited_row
    one, other = (curve(run, "pass@8")[-1] for run in ce)
    assert f"{(one + other) / 2:.3f}±{abs(one - other) / 2:.3f}".replace("0.", ".") in ce_row
    problem, num_right, own = limited["example"][0]
    (commonest, count), = Counter(own).most_common(1)
    assert tries.startswith(problem) and num_right == own.count(problem.split("=")[1])
    assert f"\n  limited N=64, epochs=12: {num_right} right; {count} × {commonest}" in tries


def test_errors_over_seeds_and_the_best_epoch_are_those_by_hand():
    mean, error = passn.mean_and_error([[1, 2], [3, 8]])
    assert mean.tolist() == [2, 5] and error.tolist() == approx([1, 3]) and passn.mean_and_error([[7]])[1] == 0
    pass_at = np.array([[[[0.1, 0.5], [0.2, 0.6]], [[0.3, 0.4], [0.1, nan]]]])  # (seeds, epochs, temperatures, N)
    assert passn.best(pass_at[:, :, :1]).tolist() == [0.5] and passn.best(pass_at).tolist() == [0.6]


def test_the_plans_of_runs(tiny, monkeypatch):
    monkeypatch.setitem(LOSSES, "new", None)  # a new loss is one line
    for name, kind in {"multiply": "answers", "prove": "steps", "search": "searches"}.items():
        monkeypatch.setitem(TASKS, name, lambda seed, kind=kind: Mock(kind=kind))
    limited, steps = " limited 8 limited 64 limited 512", " limited 2 step limited 4 step limited 8 step"
    for options, plan in {
            "": "ce 64 limited 64", "--loss new --N 4": "new 4", "--loss ce --seeds 2": "ce 64 ce 64",
            "--frontier": "ce 64" + limited, "--task prove --frontier": "ce 64" + limited + steps,
            "--task prove --per-step --N 4": "ce 4 step limited 4 step", "--task search": "reward 1 reward 64",
            "--loss all": "ce 64 limited 64 reward 64", "--task search --loss all": "ce 64 limited 64 reward 64",
            "--task search --frontier": "reward 1 reward 8 reward 64 reward 512"}.items():
        jobs = passn.jobs(passn.parse_arguments(options.split()))
        assert plan == " ".join(f"{job['loss']} {job['N']}" + " step" * job.get("per_step", False) for job in jobs)


def test_the_frontier_and_the_guessers_are_drawn_and_other_problems_never_averaged(tiny, math_dir, monkeypatch, capsys):
    assert main("--task math --math-dir . --frontier".split()) == 0 and is_drawn("out/math-frontier.png", 4)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("guess")]
    task = TASKS["math"](0, ".")
    for row, policy in zip(rows, (lambda p, N: p, limited_policy, optimal_policy), strict=True):
        assert row[-3:] == [f"{passn.guess_pass_at_n(task, policy, N):.3f}" for N in (1, 8, 64)]
    Path("train.jsonl").write_text(json.dumps(problem("What is $1+2$?", 3)))
    monkeypatch.setattr(sys, "stderr", None)  # no console, no bar
    assert main("--task math --math-dir . --loss ce --seed 1".split()) == 0 and "±" not in capsys.readouterr().out


def test_runs_of_other_settings_are_neither_overwritten_nor_averaged(tiny, monkeypatch):
    """Nor is the old run renamed when a student edits SETTINGS. In a row, only the seed and the tries shown differ."""
    task = TASKS["multiply"](0)
    for changes in ({}, {"eps": 0.5}, {"eps": 0.5000001}, {"seed": 1, "tries": 10}):
        train(task, "ce", out="out", **changes)
    monkeypatch.setitem(SETTINGS, "multiply", SETTINGS["multiply"] | {"n_embd": 8})
    train(task, "ce", seed=2, out="out")
    rows = sorted((row[0]["label"], *(run["seed"] for run in row)) for row in load_runs("out", "multiply", "", 64))
    assert rows == [("cross-entropy", 0, 1), ("cross-entropy", 2), ("cross-entropy, eps=0.5", 0),
                    ("cross-entropy, eps=0.5000001", 0)]


@parametrize("damage", [
    lambda run, last: last.pop("test"), lambda run, last: run["history"].append(last),
    lambda run, last: last["tempered"].update(abc={}), lambda run, last: last["test"].update(confidence={}),
    lambda run, last: last["tempered"]["1"].update({"pass@64": "many"}), "{", "[]", "{}", "[" * 100_000, "\0"])
def test_a_bad_run_is_named_and_costs_no_other(damage, tiny, capsys):
    run, _ = train(TASKS["multiply"](0), "ce", out="out", epochs=1)
    if callable(damage):
        damage(run, run["history"][-1])
        damage = json.dumps(run)
    Path("out/multiply-ce-N1-seed7.json").write_text(damage)
    (good,), = load_runs("out", "multiply", "", 64)
    assert good["seed"] == 0 and "multiply-ce-N1-seed7.json" in capsys.readouterr().err


def test_the_theory_is_drawn_without_training_and_shown_in_a_notebook(tiny, monkeypatch, capsys):
    display, path = Mock(), Path("out/theory.png")
    modules = {"ipykernel": None, "IPython": Mock(), "IPython.display": Mock(Image=str, display=display)}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert main(["--theory"]) == 0 and is_drawn(path, 4)
    display.assert_called_once_with(str(path))
    assert [*Path("out").iterdir()] == [path] and capsys.readouterr().out == f"Figure: {path}\n"


# ---- 8. command line -------------------------------------------------------------------------------------


def run_program(*arguments, script=(ROOT / "passn.py",), **more):
    command = [sys.executable, *script, "--n-layer", "1", "--n-embd", "16", *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def test_runs_side_by_side_are_those_one_by_one_and_a_closed_pipe_ends_quietly(tmp_path):
    """In processes of their own, and nobody reads the output, against `train` in this one. Importing has no effects."""
    code = ("import os, sys; before = dict(os.environ); import passn, toy_tasks; "
            "assert 'matplotlib' not in sys.modules and dict(os.environ) == before; sys.exit(passn.main())")
    program = run_program("--evaluations", "1", "--epochs", "1", "--out", tmp_path, script=("-c", code), cwd=ROOT)
    program.stdout.close()
    errors = program.stderr.read()
    assert program.wait(timeout=120) == 0 and is_drawn(tmp_path / "multiply.png") and "Broken" not in errors, errors
    run, _ = train(TASKS["multiply"](), "limited", n_layer=1, n_embd=16, evaluations=1, epochs=1)
    assert without_times(json.loads((tmp_path / f"{run['file']}.json").read_text())) == without_times(run)


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_ctrl_c_ends_all_runs_and_keeps_what_was_measured(tmp_path):
    program = run_program("--evaluations", "1000", "--epochs", "100000", "--out", tmp_path, start_new_session=True)
    deadline = time.time() + 90
    while len([*tmp_path.glob("*.partial")]) < min(2, os.cpu_count()) and time.time() < deadline:
        time.sleep(0.1)
    os.kill(program.pid, signal.SIGINT)  # the parent alone, which must end the others
    _, errors = program.communicate(timeout=60)
    assert program.returncode == -signal.SIGINT and "Interrupted" in errors and "Traceback" not in errors  # a loop ends
    saved = [*tmp_path.iterdir()]
    assert saved and all(path.suffix == ".partial" and json.loads(path.read_text())["history"] for path in saved)


@parametrize("options, when", [("", "train"), ("", "draw"), ("--theory", "draw_theory")])
def test_ctrl_c_at_any_time_gets_one_line(options, when, tiny, monkeypatch, capsys):
    monkeypatch.setattr(passn, when, Mock(side_effect=KeyboardInterrupt))
    assert main(options.split()) == 130 and "\nInterrupted" in capsys.readouterr().err


def refused(options, capsys):
    """The one line on standard error, after checking that it is one and that the exit status is 2."""
    with pytest.raises(SystemExit) as stop:
        main(options.split())
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == "" and output.err.count("\n") == 1
    return output.err


def test_a_full_disk_gets_one_line_and_loses_nothing(tiny, monkeypatch, capsys):
    """Neither the finished run nor what was measured of another, which is no row and takes no finished run's place."""
    def full(path, text, **more):
        write(path, text[:100], **more)
        raise OSError(28, "No space left on device")
    run, _ = train(TASKS["multiply"](0), "ce", out="out")
    passn.save(run | {"seed": 1}, "out", finished=False)
    write = Path.write_text
    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left on device" in refused("--loss ce", capsys)
    kept = {path.name: json.loads(path.read_text())["seed"] for path in Path("out").iterdir()}
    assert kept == {"multiply-ce-N1-seed0.json": 0, f"multiply-ce-N1-seed0-{os.getpid()}.partial": 1}
    assert len(load_runs("out", "multiply", "", 64)) == 1


@parametrize("options, hint", {
    "--N 0": "from 1", "--N -3": "from 1", "--N 1.5": "int value", "--N x": "int value", "--N " + "1" * 5000: "--N",
    "--loss x": "limited", "--task x": "multiply", "--device x": "auto", "--epochs -1": "from 0", "--seeds 0": "from 1",
    "--nonsense": "sense", "--weight-decay nan": "from 0", "--weight-decay -1": "from 0", "--n-embd 31": "multiple",
    "--num-traces 8": "--task multiply", "--task prove --resample-every 1": "--task prove", "--batch-size 0": "from 1",
    "--task cot --num-traces 0": "from 1", "--math-dir x": "--task multiply", "--theory --seeds 7": "--seeds",
    "--frontier --loss ce": "--loss", "--task search --loss ce --reinforce 4": "--loss reward",
    "--task cot --tries 512": "fewer --tries", "--task math --math-dir /nowhere": "train.jsonl",
    f"--out {__file__}/x": "Not a directory",
    "--device mps" if torch.cuda.is_available() else "--device cuda": "choose from"}.items())
def test_bad_arguments_get_one_line(options, hint, tiny, capsys):
    assert hint in refused(options, capsys)


@parametrize("task", [*SETTINGS])
def test_every_setting_is_a_flag(task):
    changed = {name: value * 2 for name, value in SETTINGS[task].items() if name != "per_step"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]
    assert changed.items() <= passn.parse_arguments(["--task", task, *flags]).settings.items()


@parametrize("content, hint", [
    (b"", "no MATH problems"), (b"{oops\n", "line 1"), (b'{"problem": "x"}\n', "'solution'"), (b"[1]\n", "'problem'"),
    (b'{"problem": 1, "solution": "x"}\n', "'problem'"), (b"\xff\xfe\n", "UTF-8"), (b"\xef\xbb\xbf{oops", "line 1"),
    (json.dumps(problem("What?", "x")).encode(), "no short question")])
def test_bad_math_files_get_one_line(content, hint, tiny, math_dir, capsys):
    Path("train.jsonl").write_bytes(content)
    assert hint in refused("--task math --math-dir .", capsys)


@parametrize("package, hint", [(None, "pip install datasets"),
                               (Mock(**{"load_dataset.side_effect": ConnectionError("no route\nto the hub")}), "no route")])
def test_math_without_the_package_or_the_network_names_another_way(package, hint, tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", package)  # None: as if not installed
    message = refused("--task math", capsys)
    assert hint in message and "--math-dir" in message


# ---- the README ------------------------------------------------------------------------------------------


def test_the_readmes_links_resolve():
    prose = {path: re.sub(r"```.*?```", "", text, flags=re.S) for path, text in TEXTS.items()}
    headings = {path: re.findall(r"^#+ (.*)", text.lower(), re.M) for path, text in prose.items()}
    links = [(path, link) for path, text in prose.items() for link in re.findall(r"\]\((?!http)([^)]+)\)", text)]
    for path, link in links:
        file, _, anchor = link.partition("#")
        target = Path(os.path.normpath(path.parent / file)) if file else path
        anchors = ["", *(re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings.get(target, []))]
        assert target.is_file() and anchor in anchors and len(links) > 5, (path, link)


def readme_lines(containing):
    block, = (block for block in TEXTS[ROOT / "README.md"].split("```python\n") if containing in block)
    return block.split("```")[0]


def test_the_readmes_losses_and_advantages():
    log_p = torch.tensor([-1.0, -3.0])
    exec(readme_lines("cross-entropy: be"), names := {"torch": torch, "p": log_p.exp(), "log_p": log_p, "N": 64})
    assert_close(names["loss"], dco_loss(log_p, 64).mean())
    exec(readme_lines("def advantages"), names := {})
    for dtype in (torch.bool, torch.int64, torch.float32):
        rewards = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0]], dtype=dtype)
        assert_close(names["advantages"](rewards, 2), rewards.float() / 3)


@parametrize("package, trainer, arguments", [
    ("transformers", "Trainer", "TrainingArguments"), ("trl", "SFTTrainer", "SFTConfig")])
def test_the_readmes_trainer_takes_the_steps_of_a_loop_by_hand(package, trainer, arguments, tmp_path, monkeypatch):
    """24 texts of 12 tokens, the last 1 to 4 of them the answer; a window of two batches of 8, and a short one."""
    transformers, _, datasets, package = map(pytest.importorskip, ("transformers", "accelerate", "datasets", package))
    lines = readme_lines("compute_loss")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    by_hand, texts = copy.deepcopy(model), torch.randint(97, (24, 12))
    labels = [torch.where(torch.arange(12) < 11 - i % 4, -100, text).tolist() for i, text in enumerate(texts)]
    train_dataset = datasets.Dataset.from_dict({"input_ids": texts.tolist(), "labels": labels})
    args = getattr(package, arguments)(
        tmp_path, num_train_epochs=2, optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=8, gradient_accumulation_steps=2, train_sampling_strategy="sequential")
    if trainer == "SFTTrainer":  # it wants a tokenizer, here of characters, and must not load one from the hub
        tokenizers = pytest.importorskip("tokenizers")
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({chr(33 + i): i for i in range(97)}, unk_token="!"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="!", pad_token="!")
        with_tokenizer = functools.partialmethod(package.SFTTrainer.__init__, processing_class=tokenizer)
        monkeypatch.setattr(package.SFTTrainer, "__init__", with_tokenizer)
        lines = lines.replace("from transformers import Trainer", "from trl import SFTTrainer as Trainer")
    exec(lines, names := {"model": model, "args": args, "train_dataset": train_dataset})
    def losses(examples):
        log_probs = by_hand(texts).logits.log_softmax(dim=-1)
        log_p = [sum(log_probs[i, t - 1, texts[i, t]] for t in range(11 - i % 4, 12)) for i in examples]
        return dco_loss(torch.stack(log_p), 64)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    for window in (range(16), range(16, 24)) * 2:
        optimizer.zero_grad()
        losses(window).mean().backward()
        optimizer.step()
    for trained, same in zip(model.parameters(), by_hand.parameters()):
        assert_close(trained, same, rtol=1e-4, atol=1e-6)
    assert names["trainer"].evaluate(train_dataset)["eval_loss"] == approx(losses(range(24)).mean().item())
    assert names["trainer"].predict(train_dataset).label_ids.shape == (24, 12)
    packed = {"labels": torch.tensor([[-100, 1, -100, 1]]), "input_ids": torch.tensor([[2, 1, 2, 1]])}
    with pytest.raises(AssertionError, match="do not pack"):
        names["trainer"].compute_loss(model, packed)
