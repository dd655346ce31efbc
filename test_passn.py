"""Tests against trusted references: exact arithmetic, brute force, sampling, runs made by hand, and the effect itself in
miniature. They open with the paper in five tests; then comes the machinery."""

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
from fractions import Fraction
from itertools import combinations, islice, permutations, product
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
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import passn
import toy_tasks
from passn import (GPT, LOSSES, dco_loss, estimate_pass_at_n, limited_policy, load_runs, main, optimal_policy,
                   overconfidence_factor, pass_at, pass_at_n, pass_at_n_weights, reward_loss, train)
from toy_tasks import (ATOMS, END, MAX_DEPTH, PAD, TACTICS, TASKS, apply_tactic, draw_theorems, formula_text,
                       integer_answer, join, proof_p, solve, table_of, tactics)

matplotlib.use("agg")
torch.set_num_threads(1)
ROOT = Path(passn.__file__).parent
TEXTS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "exercises" / "README.md")}
LOG_PS = [-2000, -200, -50.001, -50, -49.9, -20, -9, -4.1, -1, log(0.5), -0.1, -1e-3, -1e-6]
ONE = torch.tensor([-1.0])
TINY = {"epochs": 2, "evaluations": 2, "batch_size": 6, "n_layer": 1, "n_head": 2, "n_embd": 16}
FEW = {"multiply": {"num_train": 200, "num_test": 100}, "cot": {"num_train": 30, "num_test": 20, "num_traces": 4},
       "prove": {"num_train": 6, "num_test": 6}, "search": {"num_train": 6, "num_test": 6}}
parametrize = pytest.mark.parametrize
PRECISION = parametrize("dtype, rel", [(torch.float32, 1e-5), (torch.float64, 1e-12)])


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Every task with a tiny model, few problems and two epochs, all runs in this process, in an empty folder."""
    for name, task in [*TASKS.items()]:
        usual = {setting: default for setting, (default, _) in passn.settings_of(name).items()}
        settings = {"loss": usual["loss"], "N": usual["N"]} | TINY | FEW.get(name, {})
        monkeypatch.setitem(TASKS, name, type(task.__name__, (task,), {"settings": settings}))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.chdir(tmp_path)


def curve(run, name, N=64):
    return pass_at(run, N)[:, 0].tolist() if name == "pass" else [record[name] for record in run["history"]]


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
                assert p @ (1 - (1 - mixed) ** N) <= p @ (1 - (1 - best) ** N) + 1e-8


def test_the_effect_in_miniature():
    """Cross-entropy's pass@64 falls as it grows confident; the limited loss's stays, and ends above all of it."""
    small = {"num_train": 300, "num_test": 300, "epochs": 60, "evaluations": 6, "batch_size": 25, "n_layer": 1,
             "learning_rate": 3e-3}
    ce, limited = (train("multiply", loss, 64, **small)[0] for loss in ("ce", "limited"))
    ce_64, limited_64 = curve(ce, "pass"), curve(limited, "pass")
    assert ce_64[-1] < 0.6 * max(ce_64)
    assert limited_64[-1] > max(ce_64) and limited_64[-1] > 0.85 * max(limited_64)
    assert curve(limited, "confidence")[-1] < 0.5 * curve(ce, "confidence")[-1]


# ---- 1. pass@N and its estimates -------------------------------------------------------------------------


def test_pass_at_n_takes_an_n_for_each_problem_and_rounding_errors_and_has_its_gradient():
    p = torch.tensor([0, 0.3, 0.3, 1, 1 + 2e-16], dtype=torch.float64, requires_grad=True)
    values = pass_at_n(p, torch.tensor([8, 1, 2, 8, 8]))
    assert values.tolist() == approx([0, 0.3, 0.51, 1, 1])
    assert gradient_of(values.sum(), [p]).tolist() == approx([8, 1, 1.4, 0, 0])
    assert pass_at_n(-1e-6, 1_000_000) == 0 == pass_at_n(torch.tensor(-1e-7), 1) and pass_at_n([0.5], [2]) == 0.75
    assert pass_at_n(nan, 64).isnan() and pass_at_n(torch.tensor([nan, 1]), 64).isnan().tolist() == [True, False]


@parametrize("n, N", [(1, 1), (4, 1), (5, 3), (6, 6), (300, 64)])
def test_estimates_of_pass_at_n_and_of_its_gradient_are_unbiased(n, N):
    """Over all outcomes of n tries with success probability p; the gradient is that with respect to log p."""
    p, c = 0.07, torch.arange(n + 1)
    chance = torch.tensor([comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)], dtype=torch.float64)
    assert (chance @ estimate_pass_at_n(n, c, N)).item() == approx(1 - (1 - p) ** N, rel=1e-11)
    assert (chance @ (c * pass_at_n_weights(n, c, N))).item() == approx(N * p * (1 - p) ** (N - 1), rel=1e-11)


@parametrize("n, c, N", [
    (torch.tensor([10, 20, 40]), torch.tensor([2, 5, 0]), 4), (40, [3, 40, 1], torch.tensor([1, 2, 40])),
    (300, torch.tensor([255, 3], dtype=torch.uint8), 2), (300, np.array([255, 3], dtype=np.uint64), 2),
    (np.int64(12), np.uint8(3), 5), (8, True, 3), ([5, 9], [[1, 0], [5, 9]], 3), (7, [], 3)])
def test_counts_of_any_kind_and_a_number_for_each_problem(n, c, N):
    every = np.broadcast_arrays(*(np.asarray(x).astype(int) for x in (n, c, N)))
    exact = [1 - Fraction(comb(n - c, N), comb(n, N)) for n, c, N in zip(*(x.flatten().tolist() for x in every))]
    weights = [Fraction(N, n) * (c > 0) * Fraction(comb(n - c, N - 1), comb(n - 1, N - 1))
               for n, c, N in zip(*(x.flatten().tolist() for x in every))]
    for function, want in ((estimate_pass_at_n, exact), (pass_at_n_weights, weights)):
        got = function(n, c, N)
        assert got.shape == every[0].shape and got.flatten().tolist() == approx([*map(float, want)], rel=1e-12)


@parametrize("function, arguments, hint", [
    (pass_at_n, (1.1, 8), "probability"), (pass_at_n, (-0.1, 8), "probability"), (pass_at_n, (0.5, 0), "1 or more"),
    (pass_at_n, (0.5, nan), "1 or more"), (estimate_pass_at_n, (10, 1, 11), "fewer than N"),
    (estimate_pass_at_n, (10, [0, 11], 2), "from 0 to"), (estimate_pass_at_n, (10, -1, 2), "from 0 to"),
    (estimate_pass_at_n, (10.5, 1, 2), "whole"), (estimate_pass_at_n, (10, 1, 2.5), "whole"),
    (estimate_pass_at_n, (10, 1, nan), "whole"), (estimate_pass_at_n, ([10, 3], [1, 1], 4), "fewer than N"),
    (pass_at_n_weights, (8, 1, 64), "fewer than N"), (pass_at_n_weights, (10, 0.5, 1), "whole"),
    (dco_loss, (ONE, nan), "1 or more"), (dco_loss, (-ONE, 64), "sign"), (dco_loss, (ONE, 1e22), "1 or more"),
    (dco_loss, (torch.tensor([-2]), 64), "floating"), (overconfidence_factor, (ONE.long(), 2), "floating"),
    (reward_loss, (ONE[:0], 8), "empty"), (reward_loss, (ONE.long(), 8), "floating"), (reward_loss, (-ONE, 8), "sign"),
    (overconfidence_factor, (ONE, inf), "1 or more"), (limited_policy, ([1, nan], 8), "from 0 on"),
    (optimal_policy, ([2, -1], 8), "from 0 on"), (optimal_policy, ([0, 0], 8), "from 0 on")])
def test_what_cannot_be_is_refused(function, arguments, hint):
    with pytest.raises(ValueError, match=hint):
        function(*arguments)


# ---- 2. the losses ---------------------------------------------------------------------------------------


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
def test_reward_loss_is_minus_the_mean_and_pulls_with_pass_at_n_times_the_factor(N, dtype, rel):
    log_p = torch.tensor([0, -1e-9, -0.1, -4.0, -9.0, -30.0, -2000], dtype=dtype, requires_grad=True)
    each, loss = pass_at_n(log_p.detach().double().exp(), N), reward_loss(log_p, N)
    assert loss.shape == () and loss.dtype == dtype and loss.item() == approx(-each.mean().item(), rel=rel)
    pull = each * overconfidence_factor(log_p.detach().double(), N) / len(log_p)
    assert_close(-gradient_of(loss, [log_p]).double(), pull, rtol=1e-5, atol=1e-12)
    many = torch.full((1000,), -2.0, dtype=dtype)
    assert reward_loss(many, 1).item() == approx(-exp(-2), rel=rel)


def test_importing_has_no_effects_and_the_two_files_know_each_other_one_way_only():
    code = ("import os, sys; before = dict(os.environ), sys.stdout; import passn, toy_tasks; "
            "assert 'matplotlib' not in sys.modules and (dict(os.environ), sys.stdout) == before")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert not re.search(r"\bpassn\b", (ROOT / "toy_tasks.py").read_text(encoding="utf-8"))
    assert not re.search("|".join(rf"\b{name}\b" for name in {*TASKS} - {"search", "math"}) + r"|'math'|\"math\"|\"search\"",
                         (ROOT / "passn.py").read_text(encoding="utf-8"))


# ---- 3. the model ----------------------------------------------------------------------------------------


def small_model(vocab_size=7, block_size=12, n_layer=1, n_embd=16):
    """Random weights, large enough that the answers are far from uniform."""
    torch.manual_seed(0)
    model = GPT(vocab_size, block_size, n_layer, 2, n_embd)
    for parameter in model.parameters():
        parameter.data *= 5 if parameter.dim() == 2 else 1
    return model


def test_logits_and_gradients_are_those_of_a_plain_gpt():
    """All logits at once, the last ones alone, and one after the other with what is past kept."""
    model, tokens = small_model(n_layer=3, n_embd=32), torch.randint(7, (5, 12))
    x = model.token_embedding(tokens) + model.position_embedding.weight
    for block in model.blocks:
        normed = block.ln_1(x)
        qkv = block.query(normed), *block.key_value(normed).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (block.n_head, -1)).transpose(1, 2) for t in qkv)
        scores = q @ k.mT / 4 + torch.full((12, 12), -inf).triu(1)
        x = x + block.projection((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    plain, last = model.head(model.ln(x)), model.run(tokens, 4)[0]
    with torch.no_grad():
        logits, past = model.run(tokens[:, :5])
        steps, past = [logits], model.share(past, torch.arange(5), 7)
        for start, end in ((5, 8), *((i, i + 1) for i in range(8, 12))):
            logits, past = model.run(tokens[:, start:end], 0, past, start)
            steps.append(logits)
    for ours, theirs in ((model(tokens), plain), (last, plain[:, -4:]), (torch.cat(steps, dim=1), plain)):
        assert_close(ours, theirs, rtol=0, atol=1e-5)
    one, other = (gradient_of(logits.square().sum(), model.parameters()) for logits in (last, plain[:, -4:]))
    assert_close(one, other, rtol=1e-4, atol=1e-5 * one.abs().max().item())


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
    p = model.log_p(prompts, answers, temperature).exp()
    both = model.log_p(prompts, answers, (3.0, temperature)).exp()
    assert_close(both[1], p) and both.shape == (2, 5)
    drawn = model.sample(prompts.repeat_interleave(draws, 0), 2, temperature)
    right = (drawn.view(5, draws, 2) == answers[:, None]).all(-1).double()
    assert agree(right.mean(1), p, draws)
    assert agree(right.view(5, -1, N).amax(2).mean(1), pass_at_n(p, N), draws / N)


@torch.no_grad()
def test_the_greedy_answer_takes_the_likeliest_token_after_the_likeliest_token():
    model, prompts = small_model(n_layer=3, n_embd=32), torch.randint(2, 7, (40, 5))
    greedy = model.sample(prompts, 3, temperature=0)
    for prompt, got in zip(prompts, greedy):
        tokens = prompt
        while len(tokens) < 8 and tokens[-1] != END:
            tokens = torch.cat([tokens, model(tokens[None])[0, -1].argmax()[None]])
        assert (got[:len(tokens) - 5] == tokens[5:]).all() and (got[len(tokens) - 5:] == PAD).all()
    for dtype in (torch.float64, torch.bfloat16):
        model = model.to(dtype)
        assert model.sample(prompts, 3).shape == (40, 3) and model.log_p(prompts, greedy).dtype == dtype
    assert model.sample(prompts[:0], 3).shape == (0, 3)
    assert ((toy_tasks.choose(torch.full((50, 3), nan)) >= 0)).all()  # what a diverged model samples is no error


# ---- the tasks: one test of their interface, and one oracle for each quantity ------------------------------


def a_model(task, fit=0):
    """A small model for a task, and one that has learned a little where p would else be too small to be seen."""
    torch.manual_seed(0)
    model = task.new_model(GPT, n_layer=1, n_head=2, n_embd=16)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(fit):
        optimizer.zero_grad()
        (-model.log_p(*(torch.cat(pair) for pair in zip(task.train, task.test))).mean()).backward()
        optimizer.step()
    return model


def math_folder(folder, number=9):
    for split in ("train", "test"):
        problems = [{"problem": f"What is {n}?", "solution": f"\\boxed{{{n % 3}}}"} for n in range(number)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, problems)))
    return str(folder)


@torch.no_grad()
@parametrize("name", [*TASKS])
def test_p_is_the_share_of_right_tries_and_the_confidence_that_of_the_greedy_answer(name, tmp_path):
    few = {"math_dir": math_folder(tmp_path)} if name == "math" else {"num_train": 9, "num_test": 3}
    task, draws = TASKS[name](0, **few), 8_000
    with torch.enable_grad():
        model = a_model(task, fit=60 * (name in ("multiply", "cot", "math")))
    if task.num_samples:
        task.num_samples = draws
    p, confidence = task.measure(model)
    shown = task.show_tries(model, draws)
    assert len(shown) == 3 and p.shape == (len(task.temperatures), len(confidence)) and task.temperatures[0] == 1
    for exact, sure, (problem, num_right, tries) in zip(p[0].tolist(), confidence.tolist(), shown):
        assert len(tries) == draws and num_right / draws == approx(exact, abs=4.5 * (exact / draws) ** 0.5 + 1e-3)
        commonest = Counter(tries).most_common(1)[0][1] / draws
        assert 0 < sure <= commonest + 0.02 or "no proof" in tries and sure > 0  # also of an attempt that fails
        right = problem.split("?")[-1].split("=")[-1].split(":")[-1]
        assert "⊢" in problem or num_right == tries.count(right) and not any("<end>" in text for text in tries)
    hot = task.measure(model)[0][-1]
    assert not torch.equal(hot, p[0])


@parametrize("name", ["multiply", "cot"])
def test_products_are_right_and_no_pair_of_factors_comes_twice(name):
    task, again, other = (TASKS[name](seed, 700, 500) for seed in (3, 3, 4))
    assert all(map(torch.equal, task.train, again.train)) and not torch.equal(task.test[0], other.test[0])
    pairs, orders, swapped = set(), Counter(), Counter()
    for prompts, answers in (task.train, task.test):
        for prompt, answer in zip(map(task.text, prompts), map(task.text, answers)):
            a, b = map(int, re.fullmatch(r"(\d\d)\*(\d\d)[=:]", prompt).groups())
            pairs.add(frozenset((a, b)))
            swapped[a > b] += 1
            assert answer[-4:] == f"{a * b:04d}"
            if name == "cot":
                first, second, total = map(int, re.split(r"[+=]", answer))
                assert first + second == total and {first, second} == {a * (b % 10), a * (b - b % 10)}
                orders[first == a * (b % 10)] += 1
    assert len(pairs) == 1200 and min(swapped.values()) > 300 and (name == "multiply" or min(orders.values()) > 300)
    with pytest.raises(ValueError, match="4095 problems"):
        TASKS[name](0, num_train=4000)


def test_a_traces_p_is_the_given_one_and_the_share_of_other_right_ones():
    """Of four sampled traces one is the given one, one is another that is right, and two are wrong."""
    task = TASKS["cot"](0, 20, 5, num_traces=4, resample_every=2)
    model, (prompts, given) = a_model(task), task.train
    other, wrong = given.clone(), given.clone()
    other[:, 0], wrong[:, -1] = (other[:, 0] + 1) % 16, (wrong[:, -1] + 1) % 16
    draws = iter([[given, other, wrong, wrong], [given] * 4])
    sampled = lambda asked, *_: torch.stack(next(draws), dim=1).flatten(0, 1)[:len(asked)]
    batch = torch.tensor([3, 1, 4])
    exact = model.log_p(prompts[batch], given[batch])
    for epoch, share in ((0, 0.25), (1, 0.25), (2, 0)):  # sampled anew in every second epoch
        task.refresh(Mock(sample=sampled), epoch)
        log_p = task.log_p(model, batch)
        assert_close(log_p.exp(), exact.exp() + share)
        assert_close(gradient_of(log_p.sum(), model.parameters()), gradient_of(exact.sum(), model.parameters()))


def test_a_steps_p_is_that_of_its_theorem_and_pulls_on_the_step():
    task = TASKS["prove"](0, 6, 3)
    batch, (theorem, row, tactic) = torch.arange(task.size), task.steps.T
    model = a_model(task)
    policy = toy_tasks.log_policy(model, task.table)
    steps = policy[row, tactic]
    task.refresh(model, 0)
    log_p = task.log_p(model, batch)
    assert_close(log_p, proof_p(policy.exp(), task.table)[theorem].log())
    assert_close(gradient_of(log_p.sum(), model.parameters()), gradient_of(steps.sum(), model.parameters()))
    task.per_step = True
    assert_close(task.log_p(model, batch), steps)


@parametrize("N", [1, 64])
def test_the_sampled_gradient_tends_to_the_exact_one(N):
    """That of pass@N by REINFORCE, against autograd through the exact p: in direction and in length."""
    task = TASKS["search"](1, 8, 1, reinforce=4096)
    model, batch = a_model(task), torch.arange(8)
    exact = gradient_of(LOSSES["reward"](task.log_p(model, batch), N), model.parameters())
    mean = sum(passn.reinforce_loss(*task.sample_tries(model, batch), N) for _ in range(3)) / 3
    sampled = gradient_of(mean, model.parameters())
    assert F.cosine_similarity(exact, sampled, dim=0) > 0.99
    assert (sampled @ exact / (exact @ exact)).item() == approx(1, abs=0.15)


# ---- theorems and proofs ---------------------------------------------------------------------------------


def small_theorem(pick, atoms="ab", hypotheses=3):
    def formula(depth):
        return pick.choice(atoms) if depth == 0 or pick.random() < 0.4 else (formula(depth - 1), formula(depth - 1))
    return tuple(dict.fromkeys(formula(2) for _ in range(hypotheses))), formula(2)


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
    """And what has a countermodel by truth table is not even tried."""
    pick, counts = random.Random(1), Counter()
    peirce = (), ((("a", "b"), "a"), "a")  # true by truth table, but not provable without the excluded middle
    for theorem in [peirce, *(small_theorem(pick, hypotheses=2) for _ in range(300))]:
        provable = derivable(*theorem)
        assert (solve(theorem, 12)[0] < inf) == provable, theorem
        assert not provable or not ~toy_tasks.truth(theorem[1]) & functools.reduce(
            int.__and__, map(toy_tasks.truth, theorem[0]), -1)
        counts[provable] += 1
    assert min(counts.values()) > 50 and not derivable(*peirce)
    assert apply_tactic((("a",), ("a", "b")), "i") == ((("a",), "b"),)  # no hypothesis comes twice


def all_proofs(state, policy_of, depth=MAX_DEPTH):
    """Every proof of a state as its probability and its number of tactics, by enumeration."""
    for tactic, left in tactics(state).items() if depth else ():
        for parts in product(*(all_proofs(part, policy_of, depth - 1) for part in left)):
            yield policy_of(state, tactic) * prod(p for p, _ in parts), 1 + sum(steps for _, steps in parts)


@pytest.fixture(scope="module")
def proofs():
    """Twelve theorems, their tables, and a random policy's logits for the states of each."""
    theorems, _ = draw_theorems(5, 12, 0)
    tables = [*map(table_of, theorems)]
    torch.manual_seed(0)
    return theorems, tables, [2 * torch.randn(table.subgoals.shape[:2], dtype=torch.float64) for table in tables]


def random_policy(table, logits):
    return logits.masked_fill(table.subgoals[..., 0] == toy_tasks.NO_TACTIC, -inf).log_softmax(-1)


@parametrize("numbers", [[3], [7, 0, 7, 2], [*range(12)]])
def test_p_its_gradient_and_the_shortest_proof_are_those_of_all_proofs_one_by_one(numbers, proofs):
    """Where a theorem's proofs are few. Blind search and the surest attempt come from the same recursion."""
    theorems, tables, logits = ([part[i] for i in numbers] for part in proofs)
    leaf, table, checked = torch.cat(logits).requires_grad_(), join(tables), 0
    policy = random_policy(table, leaf).exp()
    uniform = (table.subgoals[..., 0] != toy_tasks.NO_TACTIC).double()
    uniform /= uniform.sum(dim=1, keepdim=True)
    assert_close(proof_p(uniform, table), torch.tensor([solve(theorem)[2] for theorem in theorems], dtype=torch.float64))
    assert proof_p(F.one_hot(uniform.argmax(1), len(TACTICS)).double(), table, failure=1.0).tolist() == [1.0] * len(numbers)
    for theorem, p, start in zip(theorems, proof_p(policy, table), table.theorems.tolist()):
        row = {state: i for i, state in enumerate(toy_tasks.reachable(theorem), start)}
        every = [*islice(all_proofs(theorem, lambda state, t: policy[row[state], TACTICS.index(t)]), 1000)]
        if len(every) < 1000:
            checked += 1
            total = sum(chance for chance, _ in every)
            assert_close(p, total)
            assert_close(gradient_of(p, [leaf]), gradient_of(total, [leaf]))
            shortest = toy_tasks.shortest_proof(theorem)
            assert len(shortest) == min(steps for _, steps in every) == solve(theorem)[0]
            assert all(tactic in tactics(state) for state, tactic in shortest)
    assert checked >= len(numbers) / 2


def proves(state, proof):
    """Whether nested tuples, such as ("D", ("A",), ("i", ("B",))), are a proof, by the kernel."""
    subgoals = apply_tactic(state, proof[0])
    return len(subgoals) == len(proof) - 1 and all(map(proves, subgoals, proof[1:]))


def test_sampled_attempts_succeed_as_often_as_they_should_and_prove(proofs):
    theorems, tables, logits = proofs
    table = join(tables)
    log_policy = random_policy(table, torch.cat(logits))
    is_proved, log_pi, choices = toy_tasks.sample_attempts(log_policy, table, 3000)
    assert agree(is_proved.double().mean(dim=1), proof_p(log_policy.exp(), table), 3000) and is_proved.sum() > 100
    chances = {}
    for i, (proved, chance, text) in enumerate(zip(is_proved.flatten(), log_pi.flatten(), toy_tasks.proof_texts(choices))):
        if proved:  # "D(A, i(B))"
            theorem = i // 3000
            nested = eval(re.sub(r"(\w)(\(?)", lambda m: f"('{m[1]}', " + ")" * (not m[2]), text))
            assert proves(theorems[theorem], nested)
            assert chances.setdefault((theorem, text), chance.item()) == approx(chance.item())
    for (theorem, text), chance in chances.items():  # the chance that it has is the share that it is
        share = sum(other == text for other in toy_tasks.proof_texts(choices)[3000 * theorem:3000 * theorem + 3000]) / 3000
        assert share == approx(exp(chance), abs=4.5 * (exp(chance) / 3000) ** 0.5 + 1e-3)


def test_a_state_reads_the_same_alone_and_beside_others(proofs):
    """Sets of hypotheses are read once, for all their goals; the model sees all of a state."""
    _, tables, _ = proofs
    task = TASKS["search"](0, 1, 1)
    model = small_model(len(task.vocab), task.block_size, 2)
    both = toy_tasks.log_policy(model, join(tables[:2]))
    assert_close(both, torch.cat([toy_tasks.log_policy(model, table) for table in tables[:2]]), rtol=1e-4, atol=1e-5)
    table = tables[0]
    texts = torch.cat([table.hypotheses[table.under], table.goals], dim=1)
    whole = model(texts)[:, -1, 2:2 + len(TACTICS)].double()
    assert_close(toy_tasks.log_policy(model, table), random_policy(table, whole), rtol=1e-4, atol=1e-5)
    hypothesis = ("a", "b"), ("c", "d")
    assert toy_tasks.padded(toy_tasks.as_read(toy_tasks.hypotheses_text((hypothesis, "a"))), 12) == ["<pad>"] * 3 + [*"(ab)cdAaB"]
    assert formula_text(hypothesis) == "(a→b)→c→d"


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


def test_theorems_are_hard_distinct_and_the_same_for_the_same_seed():
    """No two are the same up to the names of their atoms and the order of their hypotheses."""
    (train_set, test_set), again, other = (draw_theorems(seed, 15, 5) for seed in (3, 3, 4))
    draw_theorems.cache_clear()
    assert (train_set, test_set) == again == draw_theorems(3, 15, 5) != other and len(test_set) == 5
    namings, forms = [str.maketrans(ATOMS, "".join(order)) for order in permutations(ATOMS)], set()
    for theorem in train_set + test_set:
        assert 0 < solve(theorem)[2] <= toy_tasks.MAX_BLIND
        *hypotheses, goal = map(formula_text, (*theorem[0], theorem[1]))
        forms.add(min((goal.translate(new), *sorted(h.translate(new) for h in hypotheses)) for new in namings))
    assert len(forms) == 20


# ---- MATH ------------------------------------------------------------------------------------------------


@parametrize("solution, integer", [
    (r"$\boxed{-12}$ is it", "-12"), (r"first \boxed{2}, then \fbox{2}.", "2"), (r"\fbox{42}", "42"), ("", None),
    (r"first \boxed{1}, then \boxed{2}", None), (r"$\boxed{-2}$ and $\boxed{1}$", None), (r"so $\boxed -7 $", "-7"),
    (r"$\boxed{\frac{1}{\sqrt{2}}}$", None), (r"\boxed{5} or \boxed{\frac{1}{2}}", None), (r"$\boxed{007}$", "7"),
    (r"$\boxed{1000}$", None), (r"\boxed{$11$}", "11"), (r"$\boxed{3.5}$", None), (r"$\boxed{3", None), (r"\boxed", None),
    (r"$\boxed 3.5$", None), (r"$\boxed 5,000$", None), (r"$\boxed 3 + 4$", None), (r"$\boxed 9$.", "9"),
    (r"\boxed{5}. Now \boxed is a word", "5"), (r"\boxed{.3}", None), (r"\boxed{28} or \boxed{28_9}", None),
    (r"\boxed{1{,}008{,}016}", None), (r"$\boxed{7.}$ or $\boxed{7}$", "7"), (r"\boxed {17}", "17"), (r"\boxedx{3}", None)])
def test_the_answer_is_what_all_boxes_hold(solution, integer):
    assert integer_answer(solution) == integer


def problem(question, answer):
    return {"problem": question, "level": "Level 1", "type": "Algebra", "solution": f"It is $\\boxed{{{answer}}}$."}


MATH = {"train": [problem("What is $1+1$?", 2), problem("What is $2+3$?", 5), problem("Find $x$ in $x=2$.", 2),
                  problem("[asy] a picture [/asy]", 3), problem("word " * 65, 4), problem("A half?", r"\frac12")],
        "test": [problem("What is $3-1$?", 2), problem("What is $-3-4$?", -7), problem("Unheard of: 2+3?", 5)]}


@pytest.fixture
def math_dir(tmp_path):
    for split, problems in MATH.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, problems)) + "\n")
    return str(tmp_path)


def test_math_keeps_short_questions_with_integer_answers(math_dir):
    task = TASKS["math"](0, math_dir)
    assert [*map(task.text, task.train[1])] == ["2", "5", "2"] and [*map(task.text, task.test[1])] == ["2", "-7", "5"]
    assert task.text(task.train[0][0]) == "Whatis$1+1$?" and "<unk>" in task.text(task.test[0][2])
    assert task.train[1][0].tolist()[1:] == [END, PAD, PAD, PAD] and task.train[0][0, 0] == PAD
    guesses = passn.guessers(task, 2)  # 2 is right in 2/3, 5 in 1/3, -7 never
    assert guesses["guess by frequency"] == approx([2 / 3, 0, 1 / 3])
    for name, policy in zip([*guesses][1:], (limited_policy, optimal_policy)):
        q = policy([2 / 3, 1 / 3], 2)
        assert guesses[name] == approx([q[0], 0, q[1]]) and "2" in name


def test_math_reads_the_original_release_and_the_datasets_package_alike(math_dir, tmp_path, monkeypatch):
    for split, problems in MATH.items():
        folder = tmp_path / "release" / split / "algebra"
        folder.mkdir(parents=True)
        for i, example in enumerate(problems, 1):
            (folder / f"{i * 5}.json").write_text(json.dumps(example))
    asked = []
    load_dataset = lambda name, subject, split: asked.append(subject) or (MATH[split] if subject == "algebra" else [])
    monkeypatch.setitem(sys.modules, "datasets", Mock(load_dataset=load_dataset))
    expected = TASKS["math"](0, math_dir)
    for task in (TASKS["math"](0, tmp_path / "release"), TASKS["math"](0)):
        assert task.vocab == expected.vocab and task.data == expected.data
        assert all(map(torch.equal, (*task.train, *task.test), (*expected.train, *expected.test)))
    assert asked[:7] == sorted(asked[:7]) and len({*asked}) == 7  # in the order of the release's folders


# ---- 4. training -----------------------------------------------------------------------------------------


def without_times(run):
    return json.loads(json.dumps(run | {"history": [record | {"seconds": 0} for record in run["history"]]}))


@parametrize("name, changes", [("multiply", {}), ("cot", {}), ("prove", {}), ("search", {"reinforce": 4})])
def test_same_seed_same_run(name, changes, tiny):
    loss = "reward" if "reinforce" in changes else "limited"
    runs = [without_times(train(name, loss, 4, seed, **FEW[name], **changes)[0]) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_a_run_is_as_described(tiny):
    run, model = train("multiply", "limited", 50, out="new folder", epochs=3, evaluations=3, num_train=600, pass_over=0.0)
    path, = Path("new folder").iterdir()
    assert path.name == "multiply-limited-N=50-epochs=3-evaluations=3-pass_over=0.0-num_train=600-seed0.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(run)) and path.stat().st_size < 1e6
    assert run["label"] == "limited N=50, epochs=3, evaluations=3, pass_over=0.0, num_train=600"
    assert {*run} == {"task", "loss", "N", "seed", "label", "config", "num_samples", "temperatures", "history",
                      "baselines", "tries"} and run["config"]["num_test"] == 100 and run["config"]["eps"] == 1e-3
    assert [record["updates"] for record in run["history"]] == [0, 100, 200, 300]
    assert [record["epoch"] for record in run["history"]] == [0, 1, 2, 3]
    last, task = run["history"][-1], TASKS["multiply"](0, 600, 100)
    assert 0 < run["history"][1]["seconds"] <= last["seconds"]
    p = model.log_p(*task.test, (1.0, 2.5)).exp()
    assert last["p"][0] == approx(p[0].tolist(), rel=1e-5) and last["p"][-1] == approx(p[1].tolist(), rel=1e-5)
    log_p = model.log_p(*task.train)[::2].detach()  # of at most 500 training examples, all over the set
    assert last["train_p"] == approx(log_p.exp().mean().item(), rel=1e-4)
    assert last["loss"] == approx(dco_loss(log_p, 50).mean().item(), rel=1e-4)
    for N in (1, 8, 50, 512):
        assert pass_at(run, N)[-1, 0] == approx(pass_at_n(torch.tensor(last["p"][0]), N).mean().item())
    assert [len(tries) for _, _, tries in run["tries"]] == [64] * 3


def test_every_setting_does_something(tiny):
    """Each is changed alone, where it applies. What does nothing is refused."""
    other = {"epochs": 1, "evaluations": 1, "batch_size": 7, "learning_rate": 1e-2, "weight_decay": 0.5, "eps": 1e-8,
             "pass_over": 0.9999, "n_layer": 2, "n_head": 4, "n_embd": 32, "num_train": 150, "num_test": 9,
             "per_step": True, "reinforce": 8}
    for name, loss in (("multiply", "limited"), ("prove", "limited"), ("search", "reward")):
        usual = train(name, loss, 8)[0]
        for setting in {*passn.settings_of(name)} & {*other}:
            value = other[setting] if setting not in ("pass_over", "num_train", "num_test") or name == "multiply" else None
            if value is not None and (name == "multiply" or setting not in passn.settings_of("multiply")):
                run = train(name, loss, 8, **{setting: value})[0]
                assert without_times(run)["history"] != without_times(usual)["history"], setting
                assert run["label"] == f"{loss} N=8, {setting}={value}"


@parametrize("arguments, changes, hint", [
    (("multiply", "ce"), {"learing_rate": 1}, "learing_rate is no setting"), (("multiply", "limited", 0), {}, "N = 0"),
    (("multiply", "limited", 2.5), {}, "N = 2.5"), (("multiply", "ce"), {"epochs": -1}, "epochs = -1"),
    (("multiply", "ce"), {"epochs": 1.5}, "epochs = 1.5"), (("multiply", "ce"), {"eps": nan}, "eps = nan"),
    (("multiply", "ce"), {"pass_over": 0.2}, "nothing"), (("multiply", "reward"), {"pass_over": 0.2}, "nothing"),
    (("multiply", "limited", 1), {"pass_over": 0.2}, "nothing"), (("prove", "ce"), {"per_step": True}, "nothing"),
    (("cot", "ce"), {"num_traces": 8}, "nothing"), (("search", "ce"), {"reinforce": 8}, "nothing"),
    (("search", "reward", 64), {"reinforce": 8}, "fewer than 64"), (("nothing",), {}, "no task"),
    (("multiply", "hinge"), {}, "no loss"), (("multiply", "ce"), {"n_embd": 10, "n_head": 4}, "multiple"),
    (("multiply", "ce"), {"num_train": 5000}, "problems in all"), (("multiply", "ce", 1, -1), {}, "seed = -1")])
def test_train_refuses_what_does_not_fit(arguments, changes, hint):
    with pytest.raises(ValueError, match=hint):
        train(*arguments, **changes)


def test_a_number_is_taken_as_its_settings_type_so_that_equal_settings_are_one_row(tiny):
    for seed, eps in ((0, 1), (1, 1.0), (2, np.float64(1))):
        train("multiply", "ce", seed=seed, out="out", eps=eps)
    (row,) = load_runs("out", "multiply")
    assert [run["seed"] for run in row] == [0, 1, 2] and row[0]["label"] == "cross-entropy, eps=1.0"


@parametrize("name", ["multiply", "cot", "prove", "search"])
def test_one_problem_is_enough(name, tiny):
    run, _ = train(name, "limited", 1_000_000, num_train=1, num_test=1)
    assert 0 <= curve(run, "pass")[-1] <= 1 and len(run["tries"]) == 1
    assert np.isnan(pass_at(run, 1_000_000)).all() == (name == "cot")


def test_the_learning_rate_rises_over_a_twentieth_of_training_and_falls_to_a_tenth():
    rates = [passn.schedule(i / 1000) for i in range(1001)]
    assert (rates[0], max(rates), rates.index(max(rates)), rates[-1]) == approx((0.01, 1, 50, 0.1), rel=0.02)


def test_solved_examples_are_passed_over_and_the_order_is_the_seeds(tiny, monkeypatch):
    """F(64, p) falls below 0.1 between p = 3.4/64 and 3.8/64. Where half of the examples are beyond, half as many updates
    are made, of full batches; where all are, there is none; and one that is no longer solved pulls again."""
    def log_p(self, model, batch):
        if torch.is_grad_enabled():
            seen.append(batch.tolist())
        values = torch.where(batch % 2 == 0, p["even"], p["odd"]).log().requires_grad_()
        pulls.append(values)
        return values + 0 * model.head.weight.sum()

    def updates(loss="limited", N=64, seed=0, **changes):
        seen.clear(), pulls.clear()
        settings = {"epochs": 4, "batch_size": 20, "evaluations": 1, "num_train": 200} | changes
        return train("multiply", loss, N, seed, **settings)[0]["history"][-1]["updates"]

    p, seen, pulls = {"even": 3.8 / 64, "odd": 3.4 / 64}, [], []
    monkeypatch.setattr(toy_tasks.Task, "log_p", log_p)
    assert updates() == 20 and len(seen) == 10 + 3 * 5 and all(i % 2 for batch in seen[10:] for i in batch)
    for values in pulls:  # those that are solved get no gradient, even when first seen
        assert values.grad is None or ((values.grad != 0) == (values.detach() < log(3.6 / 64))).all()
    assert updates("ce") == updates(N=1) == updates(pass_over=0.0) == updates("reward") == 40  # over none
    assert updates("ce", num_train=190) == 4 * 190 // 20  # what is left of an epoch counts in the next
    orders = [updates(loss, seed=seed) and seen[0] for loss, seed in (("ce", 0), ("reward", 0), ("ce", 1))]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) != orders[0]
    p["odd"] = p["even"]
    assert updates() == 0 and len(seen) == 10
    changing = iter([3.8 / 64] * 12 + [1e-3] * 1000)
    monkeypatch.setattr(toy_tasks.Task, "log_p", lambda self, model, batch: log(next(changing)) + 0 * model.head.weight.sum()
                        + torch.zeros(len(batch)))
    assert updates() > 0


def test_training_that_diverges_says_so_and_costs_neither_what_was_measured_nor_another_run(tiny, monkeypatch, capsys):
    monkeypatch.setitem(LOSSES, "ce", lambda log_p, N: nan * log_p.sum())
    assert main(["--task", "cot"]) == 2 and Path("out/cot.png").exists() and [*Path("out").glob("cot-cross*.partial")]
    said = capsys.readouterr()
    assert "diverged: try a smaller" in said.err and "limited N=64" in said.out and "cross-entropy" not in said.out


@parametrize("name", ["multiply", "cot", "prove", "search"])
def test_logits_that_are_no_numbers_never_count_as_solved(name, tiny, monkeypatch):
    """Also where the parameters are finite, and where tries are sampled from such logits."""
    run_as_ever = GPT.run
    monkeypatch.setattr(GPT, "run", lambda self, *args: (nan * run_as_ever(self, *args)[0], run_as_ever(self, *args)[1]))
    with pytest.raises(FloatingPointError, match="diverged"):
        train(name, "reward" if name == "search" else "limited", 4, **({"reinforce": 8} if name == "search" else {}))


@parametrize("name, losses, changes", [
    ("prove", ("ce", "limited"), {"epochs": 25, "batch_size": 25, "n_embd": 48}),
    ("search", ("reward", "reward"), {"num_train": 60, "num_test": 40, "epochs": 5, "batch_size": 5, "learning_rate": 1e-2,
                                      "reinforce": 64})])
def test_the_disease_and_the_cure_on_proofs(name, losses, changes):
    """Of imitation, and of reinforcement learning from sampled attempts: N = 1, and N = 64."""
    small = {"seed": 1, "num_train": 28, "num_test": 28, "n_layer": 1, "n_embd": 32, "evaluations": 5} | changes
    runs = [train(name, loss, N, **small)[0] for loss, N in zip(losses, (1, 64))]
    (one, many), (sure, unsure) = ([curve(run, kind) for run in runs] for kind in ("pass", "confidence"))
    blind = pass_at_n(runs[0]["baselines"]["blind search"], 64).mean()
    assert one[-1] < 0.9 * max(one) and max(one) > 1.3 * blind  # it learned, too
    assert many[-1] > 0.85 * max(many) and many[-1] > 1.15 * one[-1] and unsure[-1] < 0.75 * sure[-1]


# ---- an emulated GPU that, as Apple's, has no float64 ------------------------------------------------------


class OnGPU(torch.Tensor):
    """A tensor of an emulated GPU: never float64, and never together with one of the CPU, but as an index."""
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if function == torch.Tensor.device.__get__:
            return torch.device("mps")
        if name in ("cpu", "tolist", "item"):
            return getattr(args[0].as_subclass(torch.Tensor), name)()
        flat = [x for arg in (*args, *(kwargs or {}).values()) for x in (arg if isinstance(arg, (list, tuple)) else [arg])]
        is_mixed = name in ("__getitem__", "__setitem__", "to") or name[-1:] == "_"  # autograd's gradients are plain tensors
        if not is_mixed and any(type(x) in (torch.Tensor, torch.nn.Parameter) and x.dim() for x in flat):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        result = super().__torch_function__(function, types, *on_cpu(args, kwargs))
        assert not (isinstance(result, OnGPU) and result.dtype == torch.float64), "this GPU has no float64"
        return result


def is_gpu(x):
    return isinstance(x, (str, torch.device)) and str(x) == "mps"


def on_cpu(args, kwargs):
    """The arguments of the same call on the CPU."""
    return (tuple("cpu" if is_gpu(x) else x for x in args),
            {name: "cpu" if is_gpu(x) else x for name, x in (kwargs or {}).items()})


class EmulatedGPU(TorchFunctionMode):
    """Makes tensors of the emulated GPU where one asks for its device."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        new_args, new_kwargs = on_cpu(args, kwargs)
        result = function(*new_args, **new_kwargs)
        if any(map(is_gpu, (*args, *(kwargs or {}).values()))) and type(result) is torch.Tensor:
            assert result.dtype != torch.float64, "this GPU has no float64"
            return result.as_subclass(OnGPU)
        return result


def move(module, device):
    """`Module.to` for tensors of this kind."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = torch.nn.Parameter(parameter.detach().to(device))
    return module


def test_the_emulated_gpu_is_strict():
    with EmulatedGPU():
        x = torch.ones(3).to("mps")
        assert x.device.type == "mps" == (x + 1).device.type and x.cpu().device.type == "cpu"
        for refused in (lambda: x.double(), lambda: x + torch.ones(3), lambda: torch.ones(2, dtype=torch.float64, device="mps")):
            with pytest.raises((AssertionError, RuntimeError)):
                refused()


@parametrize("name, changes", [("multiply", {}), ("cot", {}), ("prove", {}), ("search", {}), ("math", {}),
                               ("search", {"reinforce": 8})])
def test_a_gpu_without_float64_trains_samples_and_measures_every_task(name, changes, tiny, tmp_path, monkeypatch):
    changes = changes | ({"math_dir": math_folder(tmp_path)} if name == "math" else {})
    loss = "reward" if name == "search" else "limited"
    monkeypatch.setattr(torch.nn.Module, "to", move)
    with EmulatedGPU():
        run, model = train(name, loss, 4, device="mps", **changes)
    assert all(isinstance(parameter, OnGPU) for parameter in model.parameters())
    again, _ = train(name, loss, 4, **changes)
    assert run["history"][0]["p"][0] == approx(again["history"][0]["p"][0], abs=0.1 if name == "cot" else 1e-5)
    assert run["history"][-1]["updates"] == again["history"][-1]["updates"] > 0


def test_losses_estimates_and_policies_work_beside_a_gpu_without_float64():
    with EmulatedGPU():
        log_p = torch.tensor([-1.0, -5.0]).to("mps").requires_grad_()
        for N in (64, torch.tensor([8, 64]), torch.tensor([8.0, 64.0]).to("mps")):
            for loss in (dco_loss(log_p, N).mean(), reward_loss(log_p, N), overconfidence_factor(log_p, N).sum()):
                assert loss.device.type == "mps" and loss.dtype == torch.float32
                loss.backward()
        assert pass_at_n(log_p.detach().exp(), torch.tensor(8).to("mps")).tolist() == approx([0.9745, 0.0527], abs=1e-3)
        counts = torch.tensor([1, 0]).to("mps")
        assert estimate_pass_at_n(4, counts, 2).tolist() == [0.5, 0] and pass_at_n_weights(4, counts, 1).tolist() == [0.25, 0]


# ---- 5. theory -------------------------------------------------------------------------------------------


def test_policies_at_their_limits():
    p = [0.5, 0.3, 0.2, 0]
    assert optimal_policy(p, 1) == approx([1, 0, 0, 0]) and optimal_policy([2, 2, 1], 1) == approx([0.5, 0.5, 0])
    assert optimal_policy(p, 1_000_000) == approx([1 / 3, 1 / 3, 1 / 3, 0], abs=1e-5)
    assert limited_policy(p, 1) == approx(p, abs=1e-7) and limited_policy(p, 64)[3] == 0
    assert optimal_policy([3.0], 64) == approx([1]) and limited_policy([3.0], 64) == approx([1])
    assert optimal_policy(p, torch.tensor(8)) == approx(optimal_policy(p, 8))


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
        kept = gain[q > 1e-9]
        assert q.sum() == approx(1, abs=1e-9) and q.min() >= 0
        assert q.max() > 1 - 1e-6 or (np.ptp(kept) < 1e-3 and gain.max() < kept.min() + 1e-3)


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


# ---- 6. table and figures: from runs made by hand ----------------------------------------------------------


def run_by_hand(loss="ce", N=1, seed=0, p=((0.5, 0.0), (0.25, 0.25)), hot=((0.0, 0.0), (0.5, 0.25)), confidence=(0.1, 0.7), **more):
    """A run of two epochs, two temperatures and two test problems."""
    label = "cross-entropy" if loss == "ce" else f"{loss} N={N}"
    history = [{"epoch": 10 * i, "updates": i, "seconds": 1.5, "loss": 1.0, "train_p": 0.9, "confidence": sure,
                "p": [list(one), list(other)]} for i, (one, other, sure) in enumerate(zip(p, hot, confidence))]
    return {"task": "multiply", "loss": loss, "N": N, "seed": seed, "label": label, "config": {"eps": 1e-3},
            "num_samples": None, "temperatures": [1.0, 2.0], "history": history, "baselines": {"a guesser": [0.5, 0.0]},
            "tries": [["1*1=0001", 2, ["0001", "0007", "0001"]]]} | more


def put(*runs, folder="."):
    for run in runs:
        name = f"{run['task']}-{run['label']}-{json.dumps(run['config'])[1:-1].replace('/', '')}-seed{run['seed']}.json"
        Path(folder, name).write_text(json.dumps(run))


@pytest.fixture
def by_hand(tmp_path, monkeypatch):
    """Cross-entropy with two seeds, the limited and the reward loss with one."""
    monkeypatch.chdir(tmp_path)
    put(run_by_hand(), run_by_hand(seed=1, p=((0.5, 0.0), (0.75, 0.25)), confidence=(0.1, 0.9)),
        run_by_hand("limited", 2, p=((0.0, 0.0), (0.5, 0.5)), tries=[["1*1=0001", 1, ["0001", "0003", "0005"]]]),
        run_by_hand("reward", 2, confidence=(0.2, 0.3)))
    return load_runs(".", "multiply")


def test_the_table_is_that_by_hand(by_hand, capsys):
    """At the end, at temperature 1: pass@1, pass@2, pass@8 and confidence; then pass@2 in the best epoch, and at the best
    temperature. Cross-entropy's pass@2 of seed 0: (.75 + 0)/2, then (.4375 + .4375)/2, hot (.75 + .4375)/2."""
    passn.print_table(by_hand, 2)
    head, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["seeds", "pass@1", "pass@2", "pass@8", "confidence", "best@2", "&", "best", "T"]
    eight = (1 - 0.75**8), (1 - 0.25**8)
    ce_8 = (eight[0], (eight[0] + eight[1]) / 2)
    as_text = lambda one, other: f"{(one + other) / 2:.3f}±{abs(one - other) / 2:.3f}".replace("0.", ".")
    two = {0.25: 0.4375, 0.5: 0.75, 0.75: 0.9375}
    assert rows[0] == ["cross-entropy", "2", as_text(0.25, 0.5), as_text(two[0.25], (two[0.75] + two[0.25]) / 2), as_text(*ce_8),
                       as_text(0.7, 0.9), as_text(0.4375, 0.6875), as_text((two[0.5] + two[0.25]) / 2, 0.6875)]
    assert rows[1] == ["limited", "N=2", "1", ".500", ".750", f"{1 - 0.5**8:.3f}"[1:], ".700", ".750", ".750"]
    assert rows[2][:2] == ["reward", "N=2"] and rows[2][6] == ".300"
    assert rows[3] == ["a", "guesser", "2", ".250±.000", ".375±.000", f"{(1 - 0.5**8) / 2:.3f}±.000".replace("0.", ".")]


def test_the_tries_are_those_of_one_seed_and_tell_how_many_are_different(by_hand, capsys):
    by_hand[0][1]["tries"] = [["another problem", 0, ["9"]]]
    by_hand.append([run_by_hand("limited", 9, seed=7, tries=[["a problem of another seed", 0, ["9"]]])])
    passn.print_tries(by_hand)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "1*1=0001", "  cross-entropy: 2 right, 2 different; 0001 (2), 0007 (1)",
        "  limited N=2: 1 right, 3 different; 0001 (1), 0003 (1), 0005 (1)",
        "  reward N=2: 2 right, 2 different; 0001 (2), 0007 (1)"]


def drawn_by(function, *arguments):
    """The figures that a function saves."""
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **_: figures.append(figure))
        function(*arguments, "a.png")
    plt.close("all")
    return figures


def lines_of(axis):
    return {line.get_label() if line.get_label()[0] != "_" else i: line for i, line in enumerate(axis.lines)}


def test_the_figures_lines_are_those_by_hand(by_hand):
    first, more = drawn_by(passn.draw, by_hand, 2)
    axes = pass_2, pass_1, confidence, tries = [*first.axes, *more.axes]
    assert [axis.get_title() for axis in (pass_1, pass_2, tries)] == ["pass@1", "pass@2 on test problems", "pass@n at the end"]
    orange, blue, green = (matplotlib.colors.to_rgb(passn.COLORS[loss]) for loss in ("ce", "limited", "reward"))
    for axis in axes:  # a colour belongs to a loss
        assert [matplotlib.colors.to_rgb(line.get_color()) for line in axis.lines[:3]] == [orange, blue, green]
        assert axis.get_xlabel()
    for line, xs, ys in ((pass_1.lines[0], [0, 10], [0.25, 0.375]), (pass_2.lines[0], [0, 10], [0.375, 0.5625]),
                         (pass_2.lines[1], [0, 10], [0, 0.75]), (confidence.lines[0], [0, 10], [nan, 0.8]),
                         (tries.lines[1], 2 ** np.arange(10), 1 - 0.5 ** 2.0 ** np.arange(10))):
        assert line.get_xdata().tolist() == approx([*xs]) and line.get_ydata().tolist() == approx([*ys], nan_ok=True)
    named = lines_of(pass_2)
    assert named["cross-entropy: best epoch"].get_ydata()[0] == approx((0.4375 + 0.6875) / 2)
    assert named["cross-entropy: best epoch and temperature"].get_ydata()[0] == approx((0.59375 + 0.6875) / 2)
    assert lines_of(confidence)["1/N = 1/2"].get_ydata()[0] == 0.5
    assert lines_of(tries)["a guesser"].get_ydata().tolist() == approx([(1 - 0.5**n) / 2 for n in 2 ** np.arange(10)])
    labels = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in (first, more)]
    assert labels == [[*named][:5], ["cross-entropy", "limited N=2", "reward N=2", "a guesser"]]
    band = pass_2.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == approx(0.5625 + 0.125) and [band.min(), *pass_1.get_ylim()][1] == 0


def test_runs_of_one_loss_with_other_settings_or_other_n_look_different(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(run_by_hand("limited", 8), run_by_hand("limited", 64), run_by_hand("limited", 8, config={"eps": 1.0}),
        run_by_hand("new", 1_000_000))
    lines = drawn_by(passn.draw, load_runs(".", "multiply"), 64)[0].axes[0].lines
    assert len({(str(line.get_color()), line.get_linestyle()) for line in lines[:4]}) == 4


def test_a_row_is_runs_that_differ_in_the_seed_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other_shape = run_by_hand(seed=5, p=((0.5, 0.0, 0.1), (0.25, 0.25, 0.1)), hot=((0, 0, 0), (0, 0, 0)), baselines={})
    other_epochs = run_by_hand(seed=6)
    other_epochs["history"].pop()
    put(run_by_hand("limited", 8, seed=3), run_by_hand(), run_by_hand(seed=1), run_by_hand(seed=2, config={"eps": 0.5}),
        run_by_hand(seed=4, config={"eps": 1e-3, "data": "x"}), other_shape, other_epochs, run_by_hand(task="prove"),
        run_by_hand(seed=9, baselines={"another": [0.1, 0.1]}))
    rows = sorted([run["seed"] for run in row] for row in load_runs(".", "multiply"))
    assert rows == [[0, 1], [2], [3], [4], [5], [6], [9]]
    assert load_runs(".", "multiply")[-1][0]["loss"] == "limited"  # cross-entropy comes first


def test_estimates_stand_in_where_p_is_a_share_and_too_few_samples_are_nan():
    run = run_by_hand(num_samples=8)
    assert pass_at(run, 4)[0, 0] == approx(estimate_pass_at_n(8, [4, 0], 4).mean().item())
    assert np.isnan(pass_at(run, 9)).all() and pass_at(run_by_hand(), 9).shape == (2, 2)


@parametrize("damage", [
    {"history": []}, {"history": None}, {"history": [{"epoch": 0}]}, {"label": None, "config": None}, {"N": "many"},
    {"N": None}, {"seed": None}, {"baselines": {"a": [0.1]}}, {"baselines": {"a": [2.0, 0.1]}}, {"tries": [[1]]}, {"loss": None},
    {"tries": None}, run_by_hand(p=((nan, 0.5), (0.1, 0.1))), run_by_hand(p=((1.5, 0.5), (0.1, 0.1))), {"num_samples": "x"},
    run_by_hand(confidence=(0.1, nan)), run_by_hand(p=((0.5,), (0.1, 0.1))), "{", "[]", "null", "{}", "[" * 100_000, "\0"])
def test_a_bad_run_is_named_and_costs_no_other(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    put(run_by_hand())
    text = damage if isinstance(damage, str) else json.dumps(run_by_hand(seed=7) | damage)
    Path("multiply-bad.json").write_text(text)
    (good,), = load_runs(".", "multiply")
    assert good["seed"] == 0 and capsys.readouterr().err.count("multiply-bad.json") == 1


def test_errors_over_seeds_are_those_by_hand():
    mean, error = passn.over_seeds([[1, 2], [3, 8]])
    assert mean.tolist() == [2, 5] and error.tolist() == approx([1, 3]) and passn.over_seeds([[7]])[1] == 0


def test_other_problems_are_never_overwritten_or_averaged(tiny, math_dir, monkeypatch, capsys):
    """Nor is a run of other settings, though an edit of the file gave them the same label."""
    assert main("--task math --math-dir . --loss limited --N 1 8 --tries 8".split()) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("guess")]
    guesses = passn.guessers(TASKS["math"](0, "."), 8)
    for row, p in zip(rows, guesses.values(), strict=True):
        assert row[-2:] == [f"{pass_at_n(p, N).mean():.3f}".replace("0.", ".") for N in (1, 8)]
    before = {path: path.read_text() for path in Path("out").glob("*.json")}
    Path("train.jsonl").write_text(json.dumps(problem("What is $1+2$?", 3)))
    for _ in range(2):
        assert "other settings or data" in refused("--task math --math-dir . --loss ce", capsys)
    train("multiply", "ce", out="out")
    monkeypatch.setitem(passn.SETTINGS, "eps", (0.5, ""))
    with pytest.raises(ValueError, match="other settings"):
        train("multiply", "ce", out="out")
    assert all(path.read_text() == text for path, text in before.items()) and len(before) == 2


def test_the_frontier_shows_each_n_beside_the_best_at_any_number_of_tries(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    p = {1: (0.5, 0.0), 8: (0.2, 0.2), 64: (0.1, 0.1)}
    put(*(run_by_hand("limited", N, p=((0, 0), own)) for N, own in p.items()))
    rows = load_runs(".", "multiply")
    figure, = drawn_by(passn.draw_frontier, {"a": rows, "b": rows[:1]})
    first, second = figure.axes
    assert second.lines[0].get_ydata().tolist() == [1] * 10 and first.get_title() == "a"
    ns, values = first.lines[0].get_xdata(), [(1 - (1 - np.array(own)[:, None]) ** first.lines[0].get_xdata()).mean(0) for own in p.values()]
    for line, dot, own, N in zip(first.lines[::2], first.lines[1::2], values, p):
        assert line.get_ydata() == approx(own / np.max(values, axis=0)) and line.get_label() == f"trained for N = {N}"
        assert dot.get_ydata()[0] == line.get_ydata()[ns == N] and dot.get_xdata() == [N]
    drawn = []
    monkeypatch.setattr(passn, "draw", lambda *_: None)
    monkeypatch.setattr(passn, "draw_frontier", lambda panels, path: drawn.append([row[0]["label"] for row in panels["multiply"]]))
    assert main("--loss reward --N 2 --epochs 0".split()) == 0  # which has the same settings, but for the loss
    assert main("--N 1 2 4 --epochs 0".split()) == main("--loss limited --N 2 8 --epochs 0".split()) == 0
    assert drawn == [[f"{loss}, epochs=0" for loss in ("cross-entropy", "limited N=2", "limited N=4")]]  # of its own command


def test_the_theory_is_drawn_without_training(tiny, capsys):
    assert main(["--theory", "--N", "8"]) == 0 and capsys.readouterr().out == f"Figure: {Path('out/theory.png')}\n"
    assert [*Path("out").iterdir()] == [Path("out/theory.png")]
    weight, policies, confidence = drawn_by(passn.draw_theory, 8)[0].axes
    curves = lines_of(weight)
    for name, N in (("ce, N = 1", 1), ("limited, N = 8", 8)):
        x, y = curves[name].get_data()
        assert y[::40].tolist() == approx([exact_loss_and_factor(log(p), N)[1] for p in x[::40]], rel=1e-4, abs=1e-6)
    x = np.array(x)
    assert curves["reward, N = 1"].get_ydata() == approx(x)
    assert curves["reward, N = 8"].get_ydata() == approx(8 * x * (1 - x) ** 7, abs=1e-9)
    p, limited, best, level = (line.get_ydata() for line in policies.lines)
    assert limited == approx(limited_policy(p, 8)) and best == approx(optimal_policy(p, 8)[:len(best)]) and level[0] == 1 / 8
    c, value = lines_of(confidence)["N = 64"].get_data()
    assert value.tolist() == approx(passn.confident_pass_at_n(c, 64, 0.1, 500).tolist())
    dots = [line.get_data() for line in confidence.lines if line.get_marker() == "o"]
    assert [*np.ravel([x for x, _ in dots])] == sorted(np.ravel([x for x, _ in dots]), reverse=True)


# ---- 7. command line -------------------------------------------------------------------------------------


@parametrize("options, plan", {
    "": "ce 1, limited 64", "--loss limited --N 64": "limited 64", "--loss ce --seeds 2": "ce 1, ce 1", "--loss new --N 4": "new 4",
    "--frontier": "ce 1, limited 8, limited 64, limited 512", "--N 1 8": "ce 1, limited 8", "--loss ce --N 64": "ce 1",
    "--loss limited reward --N 1 64": "ce 1, limited 64, reward 1, reward 64", "--task search": "reward 1, reward 64",
    "--task search --frontier": "reward 1, reward 8, reward 64, reward 512", "--N 1 64 --pass-over 0.01": "ce 1, limited 64",
    "--task prove --loss limited --N 4 --per-step": "limited 4"}.items())
def test_every_pair_of_losses_and_ns_is_a_run_and_cross_entropy_is_trained_once(options, plan, monkeypatch):
    monkeypatch.setitem(LOSSES, "new", None)  # a new loss is one line
    jobs = passn.parse_arguments(options.split()).jobs
    assert ", ".join(f"{job['loss']} {job['N']}" for job in jobs) == plan
    assert len({(job["loss"], job["N"], job["seed"]) for job in jobs}) == len(jobs)
    for job in jobs:  # a flag reaches the runs in which it does something
        assert (job["pass_over"] == 0.01) == ("pass-over" in options and job["loss"] == "limited")
        assert job.get("per_step", False) == ("per-step" in options)


@parametrize("task", [*TASKS])
def test_every_setting_is_a_flag_and_help_shows_the_tasks_own_defaults(task, capsys):
    settings = passn.settings_of(task)
    for name, (default, about) in settings.items():
        if isinstance(default, (int, float)) and name != "seed":
            value = [] if default is False else [str(default * 2 or 64)]
            losses = ["--loss", *LOSSES] if name != "per_step" else ["--loss", "limited"]
            jobs = passn.parse_arguments(["--task", task, *losses, f"--{name.replace('_', '-')}", *value]).jobs
            assert any(job[name] != default for job in jobs), name
    with pytest.raises(SystemExit):
        passn.parse_arguments(["--task", task, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, (default, about) in settings.items():
        assert f"{about} (default: {default})" in shown


def refused(options, capsys):
    """The one line on standard error, after checking that it is one and that the exit status is 2."""
    with pytest.raises(SystemExit) as stop:
        main(options.split())
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == "" and output.err.count("\n") == 1
    return output.err


@parametrize("options, hint", {
    "--N 0": "N = 0", "--N 8 -3": "N = -3", "--N 1.5": "int value", "--N x": "int value", "--N " + "1" * 5000: "--N",
    "--loss x": "limited", "--task x": "multiply", "--device x": "auto", "--epochs -1": "from 0", "--seeds 0": "from 1",
    "--nonsense": "sense", "--weight-decay nan": "from 0", "--weight-decay -1": "from 0", "--n-embd 31": "multiple",
    "--num-traces 8": "num-traces", "--task prove --resample-every 1": "resample", "--batch-size 0": "from 1",
    "--task cot --num-traces 0": "from 1", "--math-dir x": "math-dir", "--theory --seeds 7": "--theory", "--seed -1": "seed",
    "--theory --loss ce": "--theory", "--frontier --N 4": "not allowed", "--task search --loss ce --reinforce 4": "nothing",
    "--task search --frontier --reinforce 64": "fewer than 512", "--loss ce --pass-over 0.2": "nothing",
    "--loss reward --pass-over 0.2": "nothing", "--task prove --loss ce --per-step": "nothing", "--tries 0": "from 1",
    "--task cot --loss ce --num-traces 8": "nothing", "--task cot --tries 512": "to 128", "--num-train 5000": "4095",
    "--task math --math-dir /nowhere": "train.jsonl", f"--out {__file__}/x": "Not a directory",
    "--device mps" if torch.cuda.is_available() else "--device cuda": "invalid choice"}.items())
def test_bad_arguments_get_one_line(options, hint, tiny, capsys):
    assert hint in refused(options, capsys)


@parametrize("content, hint", [
    (b"", "no MATH problems"), (b"{oops\n", "line 1"), (b'{"problem": "x"}\n', "'solution'"), (b"[1]\n", "'problem'"),
    (b'{"problem": 1, "solution": "x"}\n', "'problem'"), (b"\xff\xfe\n", "UTF-8"), (b"\xef\xbb\xbf{oops", "line 1"),
    (b'{"problem": ' + b"1" * 5000, "line 1"), (json.dumps(problem("What?", "x")).encode(), "no short question")])
def test_bad_math_files_get_one_line(content, hint, tiny, math_dir, capsys):
    Path("train.jsonl").write_bytes(content)
    assert hint in refused("--task math --math-dir .", capsys)


@parametrize("package, hint", [(None, "pip install datasets"),
                               (Mock(**{"load_dataset.side_effect": ConnectionError("no route\nto the hub")}), "no route")])
def test_math_without_the_package_or_the_network_names_another_way(package, hint, tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", package)  # None: as if not installed
    message = refused("--task math", capsys)
    assert hint in message and "--math-dir" in message


def test_main_trains_saves_and_reports_every_saved_run(tiny, capsys):
    assert main("--loss limited".split()) == 0
    assert main("--loss ce --seeds 2 --tries 10".split()) == 0
    said = capsys.readouterr().out.split("Figure")[-1]
    assert re.search(r"cross-entropy +2 .*\nlimited N=64 +1 ", said) and "best@10" in said and "nan" not in said
    assert len([*Path("out").glob("multiply-*.json")]) == 3 and Path("out/multiply.png").stat().st_size > 10_000
    assert not [*Path("out").glob("*.partial")]


def test_memory_that_is_missing_costs_one_run(tiny, monkeypatch, capsys):
    real = passn.train
    monkeypatch.setattr(passn, "train", lambda **job: real(**job) if job["loss"] == "limited" else torch.empty(10**15))
    assert main([]) == 2
    said = capsys.readouterr()
    assert "limited N=64" in said.out and len([line for line in said.err.splitlines() if line.startswith("ce N=1, seed 0: ")]) == 1


def run_program(*arguments, script=(ROOT / "passn.py",), **more):
    """As from a shell, where Ctrl-C works, also if the tests run in the background."""
    command = [sys.executable, *script, "--n-layer", "1", "--n-embd", "16", *map(str, arguments)]
    default = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=default, **more)


def wait_until(condition, seconds=90):
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline:
        time.sleep(0.1)
    return condition()


def children_of(program):
    return [int(child) for child in Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()] + [
        int(child) for task in Path(f"/proc/{program.pid}/task").iterdir() if task.name != str(program.pid)
        for child in (task / "children").read_text().split()]


def runs_of(program):
    """The processes of its runs, which is not all that it starts."""
    return [child for child in children_of(program) if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def test_what_a_run_in_its_own_process_refuses_is_a_line_and_no_traceback(tmp_path):
    program = run_program("--task", "math", "--math-dir", tmp_path, "--out", tmp_path)
    output, errors = program.communicate(timeout=120)
    assert program.returncode == 2 and output == "" and errors.count("no MATH problems") == errors.count("\n") > 0


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists() or os.cpu_count() == 1, reason="looks into /proc")


@needs_proc
def test_a_killed_run_costs_no_other_and_a_closed_pipe_ends_quietly(tmp_path):
    """In processes of their own, and nobody reads the output, against `train` in this one."""
    options = "--evaluations", "1", "--epochs", "2", "--num-train", "100", "--num-test", "9"
    program = run_program("--loss", "ce", "limited", "reward", "--out", tmp_path, *options, cwd=ROOT)
    assert wait_until(lambda: runs_of(program))
    os.kill(runs_of(program)[0], signal.SIGKILL)
    program.stdout.close()
    errors = program.stderr.read()
    assert program.wait(timeout=120) in (0, 2) and errors.count("killed") == 1 and "Broken" not in errors, errors
    assert "Traceback" not in errors and (tmp_path / "multiply.png").exists()
    saved = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(saved) == 2
    same = {"n_layer": 1, "n_embd": 16, "evaluations": 1, "epochs": 2, "num_train": 100, "num_test": 9}
    for run in saved:
        assert without_times(run) == without_times(train("multiply", run["loss"], 64, **same)[0])


@needs_proc
@parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_runs_end_with_their_parent_however_it_ends_and_what_was_measured_is_kept(sent, tmp_path):
    program = run_program("--evaluations", "1000", "--epochs", "100000", "--num-train", "100", "--num-test", "9",
                          "--out", tmp_path, start_new_session=True)
    assert wait_until(lambda: len([*tmp_path.glob("*.partial")]) == 2)
    workers = runs_of(program)
    os.kill(program.pid, sent)  # the parent alone
    _, errors = program.communicate(timeout=60)
    assert program.returncode == -sent and "Traceback" not in errors and "leaked" not in errors
    assert sent == signal.SIGKILL or "Interrupted" in errors
    alive = lambda pid: Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    assert len(workers) == 2 and wait_until(lambda: not any(map(alive, workers)), 20)
    saved = [*tmp_path.iterdir()]
    assert saved and all(path.suffix == ".partial" and json.loads(path.read_text())["history"] for path in saved)


@parametrize("options, when", [("", "train"), ("", "draw"), ("--theory", "draw_theory")])
def test_ctrl_c_at_any_time_gets_one_line(options, when, tiny, monkeypatch, capsys):
    if when == "draw":
        train("multiply", "ce", out="out")
    monkeypatch.setattr(passn, when, Mock(side_effect=KeyboardInterrupt))
    assert main(options.split()) == 130 and "\nInterrupted" in capsys.readouterr().err


def test_a_full_disk_gets_one_line_and_loses_nothing(tiny, monkeypatch, capsys):
    """Neither the finished run nor what was measured of another. A finished run removes what a broken-off one left."""
    def full(path, text, **more):
        write(path, text[:100], **more)
        raise OSError(28, "No space left on device")
    run, _ = train("multiply", "ce", out="out")
    passn.save(run | {"seed": 1}, "out", is_finished=False)
    write = Path.write_text
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert "No space left on device" in refused("--loss ce", capsys)
    kept = {path.name: json.loads(path.read_text())["seed"] for path in Path("out").iterdir()}
    assert kept == {"multiply-cross-entropy-seed0.json": 0, f"multiply-cross-entropy-seed1-{os.getpid()}.partial": 1}
    assert len(load_runs("out", "multiply")) == 1
    Path("out/multiply-cross-entropy-seed1-7.partial").write_text("{")
    train("multiply", "ce", seed=1, out="out")
    assert sorted(path.name for path in Path("out").iterdir()) == [f"multiply-cross-entropy-seed{seed}.json" for seed in (0, 1)]


# ---- the README ------------------------------------------------------------------------------------------


def test_the_readmes_links_resolve_and_its_commands_parse():
    prose = {path: re.sub(r"```.*?```", "", text, flags=re.S) for path, text in TEXTS.items()}
    headings = {path: re.findall(r"^#+ (.*)", text.lower(), re.M) for path, text in prose.items()}
    links = [(path, link) for path, text in prose.items() for link in re.findall(r"\]\((?!http)([^)]+)\)", text)]
    for path, link in links:
        file, _, anchor = link.partition("#")
        target = Path(os.path.normpath(path.parent / file)) if file else path
        anchors = ["", *(re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings.get(target, []))]
        assert target.is_file() and anchor in anchors and len(links) > 5, (path, link)
    text = " ".join(TEXTS[ROOT / "README.md"].split())
    commands = {*re.findall(r"python passn\.py( --[^`#]*?)?(?=`| ```| python| #)", text)}
    for command in commands:
        if "--help" not in command and "TASK" not in command:
            passn.parse_arguments(command.replace("DIR", ".").split())
    assert len(commands) > 8


def readme_lines(containing):
    block, = (block for block in TEXTS[ROOT / "README.md"].split("```python\n") if containing in block)
    return block.split("```")[0]


def test_the_readmes_losses():
    log_p = torch.tensor([-1.0, -3.0])
    exec(readme_lines("cross-entropy: be"), names := {"torch": torch, "p": log_p.exp(), "log_p": log_p, "N": 64})
    assert_close(names["loss"], dco_loss(log_p, 64).mean())
