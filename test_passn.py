"""Tests against trusted references: exact arithmetic, brute force, sampling, and the effect itself in miniature.

They open with the paper in five tests. The rest follows the order of the code."""

import csv
import functools
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when PyTorch is loaded: more threads gain nothing here, and wait for others

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import passn
import toy_tasks
from passn import (GPT, answer_log_p, answer_logits, dco_loss, estimate_pass_at_n, limited_policy, main, optimal_policy,
                   overconfidence_factor, pass_at_n, pass_at_n_weights, reward_loss, sample, train)
from toy_tasks import ATOMS, END, PAD, TASKS

matplotlib.use("agg")
torch.set_num_threads(1)
ROOT = Path(passn.__file__).parent
SHARED = ROOT.parent / "shared"
TINY = {"epochs": 2, "evaluations": 2, "n_layer": 1, "n_head": 2, "n_embd": 16}


@pytest.fixture
def tiny(monkeypatch):
    """Every task with a tiny model, few problems and two epochs, all runs in this process."""
    for name, settings in passn.SETTINGS.items():
        few = {"num_traces": 4, "resample_every": 1} if name == "cot" else {}
        monkeypatch.setitem(passn.SETTINGS, name, settings | TINY | few)
    for name, numbers in {"multiply": (200, 100), "cot": (30, 6), "prove": (6, 6), "search": (6, 6)}.items():
        builder = functools.partial(getattr(toy_tasks, name), num_train=numbers[0], num_test=numbers[1])
        monkeypatch.setitem(TASKS, name, builder)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def records_of(run):
    return [record["test"] for record in run["history"]]


# ---- the paper in five tests -----------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 2, 64, 1_000_000])
@pytest.mark.parametrize("p", ["0", "1e-12", "1e-6", "0.015625", "0.5", "0.999999", "1"])
def test_pass_at_n_is_exact(p, N):
    with localcontext(prec=60):
        exact = float(1 - (1 - Decimal(p)) ** N) if p != "1" else 1.0
    assert pass_at_n(float(p), N).item() == pytest.approx(exact, rel=1e-12, abs=0)


def test_one_try_is_cross_entropy_exactly():
    logits, labels = torch.randn(50, 10), torch.randint(10, (50,))
    log_p = torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    assert torch.equal(dco_loss(log_p, 1).mean(), passn.LOSSES["ce"](log_p, 64))
    assert (overconfidence_factor(log_p, 1) == 1).all()
    torch.testing.assert_close(dco_loss(log_p, 1).mean(), F.cross_entropy(logits, labels))


LOG_PS = ["-2000", "-200", "-50.001", "-50", "-49.9", "-20", "-9", "-4.1", "-1", repr(math.log(0.5)), "-0.1", "-1e-3",
          "-1e-6"]


@pytest.mark.parametrize("dtype, rel", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("N", [1, 2, 8, 64, 1_000_000])
def test_gradient_is_the_factor_times_that_of_cross_entropy(N, dtype, rel):
    log_p = torch.tensor([*map(float, LOG_PS)], dtype=dtype, requires_grad=True)
    dco_loss(log_p, N).sum().backward()
    torch.testing.assert_close(log_p.grad, -overconfidence_factor(log_p.detach(), N), rtol=rel,
                               atol=torch.finfo(dtype).tiny)


def expected_pass_at_n(p, q, N):
    return float(p @ -np.expm1(N * np.log1p(-np.minimum(q, 1 - 1e-16))))


@pytest.mark.parametrize("K", [2, 10, 1000])
@pytest.mark.parametrize("N", [1, 2, 8, 64, 100_000])
def test_no_policy_beats_the_optimal_one(K, N):
    random = np.random.default_rng(K + N)
    for p in (random.dirichlet(np.ones(K)), random.dirichlet(np.full(K, 0.05)), np.full(K, 1 / K)):
        best = optimal_policy(p, N)
        assert best.sum() == pytest.approx(1, abs=1e-9) and best.min() >= 0
        value = expected_pass_at_n(p, best, N)
        for rival in (p, *random.dirichlet(np.ones(K), 20), *random.dirichlet(np.full(K, 0.05), 20)):
            for share in (1, 0.1, 1e-3):
                assert expected_pass_at_n(p, share * rival + (1 - share) * best, N) <= value + 1e-9


def test_the_effect_in_miniature():
    """Cross-entropy's pass@64 falls as it grows confident; the limited loss's stays, and ends above all of it."""
    task = TASKS["multiply"](0, 300, 300)
    small = {"epochs": 60, "evaluations": 6, "batch_size": 25, "learning_rate": 3e-3, "n_layer": 1}
    (ce, _), (limited, _) = (train(task, loss, 64, **small) for loss in ("ce", "limited"))
    ce_64, limited_64 = ([test["pass@64"] for test in records_of(run)] for run in (ce, limited))
    assert ce_64[-1] < 0.6 * max(ce_64)
    assert limited_64[-1] > max(ce_64) and limited_64[-1] > 0.85 * max(limited_64)
    assert records_of(limited)[-1]["confidence"] < 0.5 * records_of(ce)[-1]["confidence"]


# ---- 1. pass@N -------------------------------------------------------------------------------------------


def test_pass_at_n_keeps_shapes_takes_empty_input_and_an_n_for_each_problem():
    assert pass_at_n(torch.rand(3, 4), 8).shape == (3, 4)
    assert pass_at_n([], 8).shape == (0,)
    assert pass_at_n([0.5, 0.5], torch.tensor([1, 2])).tolist() == [0.5, 0.75]


def test_pass_at_n_has_its_gradient_even_at_0_and_survives_rounding():
    p = torch.tensor([0.0, 0.3, 1.0, 1 + 2e-16], dtype=torch.float64, requires_grad=True)
    values = pass_at_n(p, 8)
    gradient, = torch.autograd.grad(values.sum(), p)
    assert gradient.tolist() == pytest.approx([8, 8 * 0.7**7, 0, 0]) and values[2:].tolist() == [1, 1]


@pytest.mark.parametrize("n", [1, 2, 7, 40, 300])
def test_estimator_is_the_exact_share_of_choices(n):
    c = torch.arange(n + 1)
    for N in {1, min(2, n), n // 2 or 1, n}:
        exact = [float(1 - Fraction(math.comb(n - k, N), math.comb(n, N))) for k in range(n + 1)]
        torch.testing.assert_close(estimate_pass_at_n(n, c, N), torch.tensor(exact, dtype=torch.float64),
                                   rtol=1e-12, atol=1e-14)


def test_estimator_is_unbiased():
    n, N, p = 20, 8, 0.07
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * estimate_pass_at_n(n, c, N).item() for c in range(n + 1))
    assert mean == pytest.approx(pass_at_n(p, N).item(), rel=1e-12)


@pytest.mark.parametrize("call, hint", [
    (lambda: pass_at_n(1.1, 8), "probability"), (lambda: pass_at_n(-0.1, 8), "probability"),
    (lambda: pass_at_n(0.5, 0), "1 or more"), (lambda: estimate_pass_at_n(10, 1, 11), "draw at least N"),
    (lambda: estimate_pass_at_n(10, [0, 11], 2), "0 to 10"), (lambda: estimate_pass_at_n(10, -1, 2), "0 to 10"),
    (lambda: estimate_pass_at_n(10, torch.tensor([0, 0.5]), 2), "whole"),
    (lambda: pass_at_n_weights(10, 1, 11), "draw at least N"), (lambda: pass_at_n_weights(10, 0.5, 1), "whole"),
    (lambda: dco_loss(torch.tensor([-1.0]), 0), "1 or more"), (lambda: dco_loss(torch.tensor([-1.0]), math.nan), "1 or"),
    (lambda: dco_loss(torch.tensor([2.3]), 64), "sign"), (lambda: overconfidence_factor(torch.tensor([-1.0]), -3), "1 or"),
    (lambda: dco_loss(torch.tensor([-1.0, -2.0]), torch.tensor([1, math.inf])), "1 or more"),
    (lambda: reward_loss(torch.empty(0), 8), "empty"), (lambda: limited_policy([0.5, math.nan], 8), "from 0 on"),
    (lambda: optimal_policy([0.5, 0.5], 0.5), "1 or more"), (lambda: optimal_policy([0, 0], 8), "from 0 on")])
def test_what_cannot_be_is_refused(call, hint):
    with pytest.raises(ValueError, match=hint):
        call()


# ---- 2. the loss -----------------------------------------------------------------------------------------


def exact_loss_and_factor(log_p, N):
    with localcontext(prec=1000, Emin=-10**9, Emax=10**9):
        p = Decimal(log_p).exp()
        fail = (1 - p) ** (N - 1)
        success = 1 - fail * (1 - p)
        with localcontext(prec=60):
            # near 1, success is 1 - tiny, and Decimal's ln would take long at this precision: use the series there
            tiny = 1 - success if success > Decimal("0.999999999") else None
        return float(-success.ln() if tiny is None else tiny_log(fail * (1 - p))), float(N * p * fail / success)


def tiny_log(x):
    """-log(1 - x) for tiny x, by its series."""
    return x + x**2 / 2 + x**3 / 3 + x**4 / 4


def check_against(rows, dtype, rel):
    smallest = torch.finfo(dtype).tiny
    for N, log_p, loss, factor in rows:
        x = torch.tensor([log_p], dtype=dtype)
        for got, want in ((dco_loss(x, N), loss), (overconfidence_factor(x, N), factor)):
            assert got.dtype == dtype and got.shape == (1,)
            if want == 0:  # the table's word for what its 60 digits cannot tell from 0
                assert 0 <= got.item() < 1e-59, (N, log_p)
            else:
                assert got.item() == pytest.approx(want, rel=rel, abs=smallest), (N, log_p)


@pytest.mark.parametrize("dtype, rel", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_loss_and_factor_match_the_reference_table(dtype, rel):
    table = SHARED / "reference" / "dco_loss.csv"
    if not table.exists():
        pytest.skip("no reference table on this machine")
    with open(table) as lines:
        check_against([(int(r["N"]), float(r["log_p"]), float(r["loss"]), float(r["factor"]))
                       for r in csv.DictReader(lines)], dtype, rel)


@pytest.mark.parametrize("dtype, rel", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_loss_and_factor_match_exact_arithmetic(dtype, rel):
    rows = []
    for text in LOG_PS:
        log_p = torch.tensor(float(text), dtype=dtype).item()  # what the loss really gets
        rows += [(N, log_p, *exact_loss_and_factor(repr(log_p), N)) for N in (1, 2, 8, 64, 1000, 1_000_000)]
    check_against(rows, dtype, rel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_finite_and_right_at_every_bound(dtype):
    """At p = 1, where p underflows, and where the formulas change: log p = -50 and log(1/2), and their neighbours."""
    edges = [0.0, -1e-300, -1e-38, -1e-7, math.log(0.5), -50.0, -1e4, -math.inf]
    edges = torch.tensor(edges, dtype=dtype)
    x = torch.cat([edges, torch.nextafter(edges[4:6], edges[:1]), torch.nextafter(edges[4:6], edges[-1:])])
    x.requires_grad_()
    for N in (1, 2, 64, 1_000_000):
        loss = dco_loss(x, N)
        gradient, = torch.autograd.grad(loss.sum(), x)
        torch.testing.assert_close(gradient, -overconfidence_factor(x.detach(), N), rtol=1e-5, atol=1e-30)
        assert gradient.isfinite().all() and (loss[x > -1e5] >= 0).all() and loss[x > -1e5].isfinite().all()
        assert gradient[5] < -0.999  # log p = -50: cross-entropy's


def test_an_empty_batch_and_an_n_for_each_example():
    assert dco_loss(torch.empty(0), 8).shape == (0,)
    log_p, N = torch.tensor([-1.0, -5.0, -3.0], requires_grad=True), torch.tensor([1, 64, 8])
    for function in (dco_loss, overconfidence_factor):
        each = torch.cat([function(log_p[i:i + 1], N[i].item()) for i in range(3)])
        assert torch.equal(function(log_p, N), each)
    gradient, = torch.autograd.grad(dco_loss(log_p, N).sum(), log_p)
    torch.testing.assert_close(gradient, -overconfidence_factor(log_p.detach(), N))


@pytest.mark.parametrize("dtype, rel", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_reward_loss_is_minus_log_of_the_mean(dtype, rel):
    log_p = torch.tensor([-0.1, -1.0, -4.0, -9.0, -30.0], dtype=dtype)
    for N in (1, 8, 64, 1_000_000):
        plain = -math.log(pass_at_n(log_p.double().exp(), N).mean())
        assert reward_loss(log_p, N).item() == pytest.approx(plain, rel=rel, abs=1e-15)
    hard = torch.tensor([-2000.0, -1999.0, 0.0 - 1e-6, -1990.0], dtype=dtype, requires_grad=True)
    for part in (hard[:2], hard):
        for N in (1, 64, 1_000_000):
            loss = reward_loss(part, N)
            gradient, = torch.autograd.grad(loss, hard, retain_graph=True)
            assert loss.isfinite() and gradient.isfinite().all() and loss.dtype == dtype
    want = 1999 - math.log(64) + math.log(2) - math.log1p(math.exp(-1))
    assert reward_loss(hard[:2], 64).item() == pytest.approx(want, rel=rel)


@pytest.mark.parametrize("n, N", [(4, 1), (4, 2), (5, 3), (6, 6), (1, 1)])
def test_weights_give_an_unbiased_gradient_of_pass_at_n(n, N):
    """Over all outcomes of n tries with success probability p = sigmoid(θ), whose log π has the gradient 1 - p."""
    p = 0.3
    expected = sum(math.comb(n, c) * p**c * (1 - p)**(n - c) * c * pass_at_n_weights(n, c, N).item() * (1 - p)
                   for c in range(1, n + 1))
    assert expected == pytest.approx(N * (1 - p)**(N - 1) * p * (1 - p), rel=1e-12)


def test_weights_are_those_of_pass_at_k_with_the_leave_one_out_baseline():
    """By enumeration: a try's advantage is the mean over all sets of N tries with it of "one of them is right", less the
    same mean over sets of N among the others (Walder and Karkhanis 2025), N/n times; a wrong try's advantage is 0."""
    assert pass_at_n_weights(4, 2, 2).item() == pytest.approx(1 / 3, rel=1e-12)
    assert pass_at_n_weights(8, torch.tensor([[0, 1], [3, 8]]), 1).tolist() == [[0, 1 / 8], [1 / 8, 1 / 8]]
    for n, c, N in ((4, 2, 2), (6, 1, 3), (7, 3, 4), (5, 5, 2), (6, 4, 2)):
        solved = [i < c for i in range(n)]
        others = list(itertools.combinations(range(1, n), N - 1))  # with try 0, which is right
        alone = list(itertools.combinations(range(1, n), N))
        with_it = sum(1 for _ in others) / len(others)
        leave_out = sum(any(solved[i] for i in chosen) for chosen in others) / len(others)
        assert len(alone) == math.comb(n - 1, N)
        assert pass_at_n_weights(n, c, N).item() == pytest.approx(N / n * (with_it - leave_out), rel=1e-12, abs=1e-15)


# ---- 3. the model ----------------------------------------------------------------------------------------


def small_model(vocab_size=7, block_size=12, **shape):
    """Random weights, large enough that the answers are far from uniform."""
    torch.manual_seed(0)
    model = GPT(vocab_size, block_size, **({"n_layer": 3, "n_head": 2, "n_embd": 32} | shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model


@torch.no_grad()
def test_cached_and_last_logits_are_those_of_the_full_pass():
    model, tokens = small_model(), torch.randint(7, (5, 12))
    full = model(tokens)
    assert full.shape == (5, 12, 7)
    torch.testing.assert_close(model(tokens, last=4), full[:, -4:], rtol=0, atol=1e-5)
    cache = torch.full((3, 2, 5, 2, 12, 16), torch.nan)  # a position read before it is written would show
    steps = [model(tokens[:, :6], cache=cache)]
    steps += [model(tokens[:, i:i + 1], cache=cache, start=i) for i in range(6, 12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=0, atol=1e-5)


def test_gradients_are_those_of_a_plain_gpt_with_torchs_own_attention():
    model, tokens = small_model(), torch.randint(7, (5, 12))

    def plain(tokens):
        x = model.token_embedding(tokens) + model.position_embedding.weight[:12]
        for block in model.blocks:
            normed = block.ln_1(x)
            q, k, v = (t.unflatten(-1, (block.n_head, -1)).transpose(1, 2)
                       for t in (block.query(normed), *block.key_value(normed).chunk(2, dim=-1)))
            x = x + block.projection(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return model.head(model.ln(x))

    def gradients(logits):
        return torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), tokens[:, -4:].flatten()), model.parameters())

    for ours, theirs in zip(gradients(model(tokens, last=4)), gradients(plain(tokens)[:, -4:])):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_sampling_in_chunks_is_sampling():
    """2,500 prompts: greedy tokens are the full pass's likeliest, sampled ones are the same for the same seed."""
    model, prompts = small_model(n_layer=1, n_embd=16), torch.randint(7, (2500, 4))
    greedy = sample(model, prompts, 5, temperature=0)
    logits = model(torch.cat([prompts, greedy], dim=1))[:, 3:-1]
    assert (logits.gather(2, greedy[:, :, None])[..., 0] > logits.amax(dim=2) - 1e-4).all()
    one, other = (sample(model, prompts, 5, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(one, other) and one.shape == (2500, 5) and not torch.equal(one[:1024], one[1024:2048])


@torch.no_grad()
def test_the_future_does_not_leak():
    model, tokens = small_model(), torch.randint(7, (2, 12))
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 7
    torch.testing.assert_close(model(tokens)[:, :8], model(changed)[:, :8])


# ---- 4. from a model to p --------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_exact_p_and_pass_at_n_agree_with_sampling(temperature):
    model, draws, N = small_model(n_layer=1, n_embd=16), 20_000, 8
    prompts = torch.randint(2, 7, (6, 5))
    answers = torch.tensor([[2, 3], [4, END], [5, 5], [6, 2], [3, 4], [2, 2]])
    p = answer_log_p(answer_logits(model, prompts, answers), answers, temperature).exp()
    drawn = sample(model, prompts.repeat_interleave(draws, 0), 2, temperature, torch.Generator().manual_seed(1))
    right = (drawn.view(6, draws, 2) == answers[:, None]).all(-1).double()
    error = (p * (1 - p) / draws).sqrt() + 1e-9
    assert ((right.mean(1) - p).abs() < 4 * error).all()
    tries = right.view(6, -1, N).amax(2)
    exact = pass_at_n(p, N)
    assert ((tries.mean(1) - exact).abs() < 4 * (exact * (1 - exact) * N / draws).sqrt() + 1e-9).all()


@torch.no_grad()
def test_probabilities_of_all_answers_sum_to_one():
    model = small_model()
    pairs = torch.cartesian_prod(torch.arange(1, 7), torch.arange(1, 7))  # all two-token answers without padding
    prompt = torch.tensor([[2, 3, 4]]).expand(len(pairs), -1)
    logits = answer_logits(model, prompt, pairs)
    logits[..., PAD] = -torch.inf
    assert answer_log_p(logits, pairs).exp().sum().item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_padding_after_an_answer_is_ignored():
    model, prompt = small_model(), torch.tensor([[2, 3, 4]])
    short, padded = torch.tensor([[5, END]]), torch.tensor([[5, END, PAD, PAD]])
    torch.testing.assert_close(answer_log_p(answer_logits(model, prompt, short), short),
                               answer_log_p(answer_logits(model, prompt, padded), padded))


def measured_by(kind, model, prompts, answers, temperature):
    task = toy_tasks.Task("", "", [], 0, (prompts, answers), (prompts, answers), answer_length=1)
    with torch.no_grad():
        return kind(task, {"N": 8, "tries": 8}, 0, "cpu").measure(model, "test", [temperature])[temperature]


@torch.no_grad()
def test_confidence_is_the_probability_of_the_greedy_answer():
    model, prompts = small_model(), torch.randint(2, 7, (40, 5))
    answers = torch.randint(2, 7, (40, 3))
    _, confidence, _ = measured_by(passn.Answers, model, prompts, answers, 1.0)
    for prompt, got in zip(prompts, confidence.log()):
        tokens, log_p = prompt[None], 0.0
        for _ in range(3):  # by hand: the likeliest token after the likeliest token …
            best = torch.log_softmax(model(tokens)[0, -1], -1).max(0)
            tokens = torch.cat([tokens, best.indices[None, None]], 1)
            log_p += best.values * (best.indices != PAD)
            if best.indices == END:
                break
        assert got.item() == pytest.approx(float(log_p), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_sampled_traces_agree_with_the_sum_over_all_traces(temperature, monkeypatch):
    model, draws = small_model(vocab_size=5, n_layer=1, n_embd=16), 20_000
    prompts, answers = torch.randint(5, (4, 3)), torch.randint(5, (4, 3))
    every = torch.cartesian_prod(*[torch.arange(5)] * 3)
    exact, greedy_share = [], []
    for prompt, answer in zip(prompts, answers):
        logits = answer_logits(model, prompt.expand(len(every), -1), every) / temperature
        p = torch.log_softmax(logits, -1).gather(2, every[..., None])[..., 0].sum(1).exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-5)
        greedy = sample(model, prompt[None], 3, temperature=0)[0]
        exact.append(p[every[:, -1] == answer[-1]].sum())
        greedy_share.append(p[every[:, -1] == greedy[-1]].sum())
    monkeypatch.setattr(passn.Traces, "num_samples", {temperature: draws})
    p, confidence, number = measured_by(passn.Traces, model, prompts, answers, temperature)
    for got, want in ((p, torch.stack(exact)), (confidence, torch.stack(greedy_share))):
        assert ((got - want).abs() < 4 * (want * (1 - want) / draws).sqrt() + 1e-9).all()
    estimate = passn.means(p, confidence, number, [8])["pass@8"]
    assert estimate == pytest.approx(pass_at_n(torch.stack(exact), 8).mean().item(), abs=0.02)


def test_from_samples_there_is_no_pass_at_more_tries_than_samples():
    half = torch.tensor([0.5, 0.0])
    assert passn.means(half, half, 4, [1, 2, 8]) == {"pass@1": 0.25, "confidence": 0.25,
                                                       "pass@2": pytest.approx(5 / 12)}


def kind_of(task, **changes):
    settings = passn.SETTINGS[task.name] | TINY | changes
    kind = passn.KINDS[task.kind](task, settings, 0, "cpu")
    torch.manual_seed(0)
    return kind, kind.new_model()


def test_a_traces_p_is_the_given_one_and_the_share_of_other_right_ones(monkeypatch):
    """Of four sampled traces one is the given one, one is another that is right, and two are wrong."""
    task = TASKS["cot"](0, 20, 5)
    kind, model = kind_of(task, num_traces=4, resample_every=2)
    given = task.train[1]
    other, wrong = given.clone(), given.clone()
    other[:, 0], wrong[:, -1] = (other[:, 0] + 1) % 16, (wrong[:, -1] + 1) % 16
    sampled = torch.stack([given, other, wrong, wrong], dim=1).flatten(0, 1)
    monkeypatch.setattr(passn, "sample", lambda *_: sampled)
    batch = torch.tensor([3, 1, 4])
    exact = answer_log_p(answer_logits(model, task.train[0][batch], given[batch]), given[batch])
    for N, epoch, share in ((1, 0, 0), (64, 1, 0), (64, 2, 0.25)):  # cross-entropy, and an odd epoch, sample none
        kind.new_epoch(model, epoch, N)
        log_p = kind.log_p(model, batch)
        torch.testing.assert_close(log_p.exp(), exact.exp() + share)
        one, two = (torch.autograd.grad(value.sum(), model.head.weight, retain_graph=True)[0] for value in (log_p, exact))
        torch.testing.assert_close(one, two)  # it pulls on the given trace all the same


def test_a_steps_p_is_that_of_its_theorem_and_pulls_on_the_step():
    task = TASKS["prove"](0, 6, 3)
    batch = torch.arange(len(task.steps))
    kind, model = kind_of(task)
    steps = kind.log_p(model, batch)
    kind.new_epoch(model, 0, 64)
    theorems = kind.log_p(model, batch)
    policy = passn.tactic_logits(model, task.train).softmax(dim=1)
    p = toy_tasks.proof_p(policy, task.train)
    torch.testing.assert_close(theorems, p[task.steps[:, 0]].log())
    torch.testing.assert_close(steps, policy[task.steps[:, 1], task.steps[:, 2]].log())
    one, two = (torch.autograd.grad(value.sum(), model.head.weight)[0] for value in (theorems, steps))
    torch.testing.assert_close(one, two)
    kind, model = kind_of(task, per_step=True)
    kind.new_epoch(model, 0, 4)
    assert torch.equal(kind.log_p(model, batch), steps)


def test_the_sampled_gradient_tends_to_the_exact_one():
    """Of pass@N by REINFORCE, against autograd through the exact p; and with n = 1, N = 1, on its mean only."""
    task = TASKS["search"](1, 8, 1)
    for N, attempts, cosine in ((64, 4096, 0.99), (1, 4096, 0.99)):
        kind, model = kind_of(task, reinforce=attempts)
        batch = torch.arange(8)
        exact = pass_at_n(kind.log_p(model, batch).exp(), N).mean()
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(exact, model.parameters())])
        sampled = [torch.autograd.grad(-kind.objective(model, batch, "reward", N), model.parameters()) for _ in range(3)]
        mean = torch.cat([torch.stack(g).mean(dim=0).flatten() for g in zip(*sampled)])
        assert F.cosine_similarity(exact, mean, dim=0) > cosine
        assert (mean @ exact / (exact @ exact)).item() == pytest.approx(1, abs=0.15)  # of the same length, too


# ---- the tasks -------------------------------------------------------------------------------------------


def texts(task, tokens):
    return ["".join(task.vocab[token] for token in row if token != PAD) for row in tokens.tolist()]


def test_multiply_is_right_and_its_splits_are_disjoint_even_with_factors_swapped():
    task, factors = TASKS["multiply"](), {}
    for split in ("train", "test"):
        prompts, answers = getattr(task, split)
        pairs = [tuple(map(int, text[:-1].split("*"))) for text in texts(task, prompts)]
        assert texts(task, answers) == [f"{a * b:04d}" for a, b in pairs]
        factors[split] = {frozenset(pair) for pair in pairs}
        assert len(factors[split]) == len(pairs)
    assert len(factors["train"]) == 2000 and len(factors["test"]) == 1000
    assert not factors["train"] & factors["test"]


def test_multiply_is_the_same_for_the_same_seed():
    one, again, other = TASKS["multiply"](3), TASKS["multiply"](3), TASKS["multiply"](4)
    assert torch.equal(one.train[0], again.train[0]) and torch.equal(one.test[1], again.test[1])
    assert not torch.equal(one.train[0], other.train[0])


def test_traces_are_right_and_come_in_both_orders():
    task, orders = TASKS["cot"](0, 200, 100), Counter()
    for split in (task.train, task.test):
        for prompt, trace in zip(texts(task, split[0]), texts(task, split[1])):
            a, b = map(int, prompt[:-1].split("*"))
            partial, answer = trace.split("=")
            first, second = map(int, partial.split("+"))
            assert int(answer) == a * b == first + second and {first, second} == {a * (b % 10), a * (b - b % 10)}
            orders[first == a * (b % 10)] += 1
    assert min(orders.values()) > 100 and task.answer_length == 4
    assert torch.equal(task.train[1], TASKS["cot"](0, 200, 100).train[1])
    assert not set(texts(task, task.train[0])) & set(texts(task, task.test[0]))


# ---- theorems and proofs ---------------------------------------------------------------------------------


def small_theorem(pick, atoms="ab", hypotheses=3):
    def formula(depth):
        return pick.choice(atoms) if depth == 0 or pick.random() < 0.4 else (formula(depth - 1), formula(depth - 1))
    return tuple(dict.fromkeys(formula(2) for _ in range(hypotheses))), formula(2)


def value(formula, truth):
    return truth[formula] if isinstance(formula, str) else not value(formula[0], truth) or value(formula[1], truth)


def is_tautology(hypotheses, goal):
    truths = (dict(zip(ATOMS, bits)) for bits in itertools.product([False, True], repeat=len(ATOMS)))
    return all(value(goal, truth) or not all(value(h, truth) for h in hypotheses) for truth in truths)


def as_term(steps):
    """A lambda term from a proof's steps: ("lambda", type, body) or ("apply", number of the variable, arguments)."""
    (hypotheses, goal), tactic = next(steps)
    if tactic == 0:
        return "lambda", goal[0], as_term(steps)
    kind, arguments = hypotheses[tactic - 1], []
    while kind != goal:
        arguments.append(as_term(steps))
        kind = kind[1]
    return "apply", tactic, arguments


def type_of(term, variables):
    """The simply typed lambda calculus, which knows nothing of tactics. Variables are numbered as hypotheses are."""
    if term[0] == "lambda":
        _, kind, body = term
        return kind, type_of(body, variables if kind in variables else (*variables, kind))
    _, number, arguments = term
    kind = variables[number - 1]
    for argument in arguments:
        premise, kind = kind
        assert type_of(argument, variables) == premise
    return kind


def test_what_the_kernel_proves_is_true_and_a_typed_lambda_term():
    pick, proved = random.Random(0), 0
    for i in range(4000):
        theorem = small_theorem(pick, "abc", 4) if i % 2 else toy_tasks.random_theorem(pick)
        length, _, blind = toy_tasks.solve(theorem)
        assert (length < math.inf) == (blind > 0)
        if length < math.inf:
            proved += 1
            proof = toy_tasks.shortest_proof(theorem)
            assert len(proof) == length
            assert is_tautology(*theorem)
            assert type_of(as_term(iter(proof)), theorem[0]) == theorem[1]
    assert proved > 1000


def derivable(theorem):
    """Natural deduction by brute force: all sequents over the theorem's subformulas, until nothing new follows."""
    def parts(formula):
        return {formula} if isinstance(formula, str) else {formula} | parts(formula[0]) | parts(formula[1])
    universe = sorted(set().union(*map(parts, (*theorem[0], theorem[1]))), key=str)
    contexts = [frozenset(c) for n in range(len(universe) + 1) for c in itertools.combinations(universe, n)]
    contexts = [c for c in contexts if c >= set(theorem[0])]
    known = {(c, a) for c in contexts for a in c}
    while True:
        new = {(c, (a, b)) for c in contexts for a, b in (f for f in universe if not isinstance(f, str))
               if (c | {a}, b) in known}
        new |= {(c, f[1]) for c, f in known if not isinstance(f, str) and (c, f[0]) in known}
        if new <= known:
            return (frozenset(theorem[0]), theorem[1]) in known
        known |= new


def test_the_kernel_is_complete_on_small_goals():
    pick, counts = random.Random(1), Counter()
    peirce = (((("a", "b"), "a"), "a"))  # true by truth table, but not provable without the excluded middle
    theorems = [((), peirce), *(small_theorem(pick, hypotheses=2) for _ in range(300))]
    for theorem in theorems:
        provable = derivable(theorem)
        assert (toy_tasks.solve(theorem, 12)[0] < math.inf) == provable, theorem
        counts[provable] += 1
    assert min(counts.values()) > 50 and not derivable(theorems[0])


def test_the_kernel_refuses_wrong_tactics():
    state = (("a", ("a", "b"), ("b", "c")), "b")
    assert toy_tasks.apply_tactic(state, 2) == ((state[0], "a"),) and toy_tasks.apply_tactic((state[0], "a"), 1) == ()
    assert [toy_tasks.apply_tactic(state, bad) for bad in (0, 1, 3, 4, -1)] == [None] * 5
    assert toy_tasks.apply_tactic(((), ("a", "a")), 0) == ((("a",), "a"),)
    assert toy_tasks.apply_tactic((("a",), ("a", "a")), 0) == ((("a",), "a"),)  # known already, not added again


def all_proofs(state, policy_of, depth):
    """Every proof of a state as its probability, by enumeration."""
    for tactic, left in toy_tasks.tactics(state).items() if depth else ():
        for parts in itertools.product(*(all_proofs(part, policy_of, depth - 1) for part in left)):
            yield policy_of(state, tactic) * math.prod(parts)


def random_policy(table, logits):
    return torch.softmax(logits.masked_fill(~table.applicable, -torch.inf), -1)


def test_proof_p_is_the_sum_over_all_proofs():
    table = TASKS["prove"](5, 3, 12).test
    torch.manual_seed(0)
    policy = random_policy(table, 2 * torch.randn(table.applicable.shape, dtype=torch.float64))
    p, row = toy_tasks.proof_p(policy, table), {state: i for i, state in enumerate(table.states)}
    policy_of = lambda state, tactic: policy[row[state], toy_tasks.FIRST_TACTIC + tactic].item()
    checked = 0
    for exact, i in zip(p.tolist(), table.theorems.tolist()):
        proofs = [*itertools.islice(all_proofs(table.states[i], policy_of, toy_tasks.MAX_DEPTH), 10**5)]
        if len(proofs) < 10**5:
            checked += 1
            assert math.fsum(proofs) == pytest.approx(exact, rel=1e-9)
    assert checked >= 6


def parse_proof(text):
    """"4(1, intro(2))" -> ["4", [["1", []], ["intro", [["2", []]]]]]"""
    return json.loads(re.sub(r"(\w+)(\(?)", lambda m: f'["{m[1]}", [' + ("" if m[2] else "]]"), text).replace(")", "]]"))


def steps_of(state, proof):
    """The steps [(state, tactic), …] of a proof, by the kernel."""
    name, parts = proof
    tactic = 0 if name == "intro" else int(name)
    subgoals = toy_tasks.apply_tactic(state, tactic)
    assert len(subgoals) == len(parts)
    return [(state, tactic)] + [step for subgoal, part in zip(subgoals, parts) for step in steps_of(subgoal, part)]


def test_sampled_attempts_succeed_as_often_as_they_should_and_prove():
    """Both ways to sample: all at once for training, and one by one as text."""
    table = TASKS["search"](5, 2, 12).test
    torch.manual_seed(0)
    policy = random_policy(table, 2 * torch.randn(table.applicable.shape, dtype=torch.float64))
    p, draws = toy_tasks.proof_p(policy, table), 3000
    is_proved, _ = toy_tasks.sample_attempts(policy.log(), table, draws, torch.Generator().manual_seed(0))
    error = (p * (1 - p) / draws).sqrt() + 1e-9
    assert is_proved.shape == (12, draws) and ((is_proved.double().mean(dim=1) - p).abs() < 4 * error).all()
    first = table._replace(theorems=table.theorems[p.argsort(descending=True)])
    shown = toy_tasks.show_attempts(policy, first, 500, torch.Generator().manual_seed(0))
    for (theorem, num_proved, proofs), row, exact in zip(shown, first.theorems.tolist(), p.sort(descending=True)[0]):
        assert abs(num_proved / 500 - exact) < 4 * (exact * (1 - exact) / 500).sqrt() + 1e-9
        hypotheses, goal = table.states[row]
        assert theorem.endswith(f"⊢ {toy_tasks.pretty(goal)}") and f"1: {toy_tasks.pretty(hypotheses[0])}" in theorem
        for proof in {*proofs} - {"no proof"}:
            steps = steps_of(table.states[row], parse_proof(proof))
            assert type_of(as_term(iter(steps)), hypotheses) == goal


def test_a_sampled_attempts_log_probability_is_the_share_of_its_likes():
    """A theorem with several proofs: how often one is sampled is the product of its choices' probabilities."""
    table = toy_tasks.proof_table([((("a", "b"), ("a", ("a", "b")), "a", ("c", "a"), "c"), "b")])
    torch.manual_seed(1)
    log_policy = random_policy(table, torch.randn(table.applicable.shape, dtype=torch.float64)).log()
    is_proved, log_pi = toy_tasks.sample_attempts(log_policy, table, 20_000, torch.Generator().manual_seed(0))
    found = 0
    for value in log_pi[is_proved].unique():
        share = (log_pi - value).abs().lt(1e-9).double().mean().item()
        number = round(share / value.exp().item())  # so many proofs have the same choices in another order
        found += share > 0.02
        assert share < 0.002 or (number >= 1 and share == pytest.approx(number * value.exp().item(), abs=0.02))
    assert found >= 3


def test_the_gradient_of_p_is_that_of_the_sum_over_all_proofs():
    """Where they are few: every proof's probability as a product of choices, by autograd; and finite differences."""
    table, checked = TASKS["search"](5, 12, 1).train, 0
    torch.manual_seed(0)
    for number in range(12):
        part = toy_tasks.part_of(table, torch.tensor([number]))
        if len(part.prompts) > 25:
            continue
        row = {table.states[r]: i for i, r in enumerate(sorted(table.reach[number]))}
        logits = torch.randn(part.applicable.shape, dtype=torch.float64, requires_grad=True)
        policy = random_policy(part, logits)
        policy_of = lambda state, tactic: policy[row[state], toy_tasks.FIRST_TACTIC + tactic]
        state = table.states[table.theorems[number]]
        proofs = [*itertools.islice(all_proofs(state, policy_of, toy_tasks.MAX_DEPTH), 3000)]
        if len(proofs) < 3000:
            checked += 1
            one, other = (torch.autograd.grad(p, logits, retain_graph=True)[0]
                          for p in (toy_tasks.proof_p(policy, part)[0], sum(proofs)))
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
            torch.autograd.gradcheck(lambda x: toy_tasks.proof_p(random_policy(part, x), part), logits, atol=1e-8)
    assert checked >= 3


def test_p_is_the_same_from_a_part_of_the_table():
    table = TASKS["search"](5, 12, 1).train
    torch.manual_seed(0)
    logits = torch.randn(table.applicable.shape, dtype=torch.float64)
    p = toy_tasks.proof_p(random_policy(table, logits), table)
    for numbers in ([3], [7, 0, 7, 2], range(12)):
        part = toy_tasks.part_of(table, torch.tensor([*numbers]))
        rows = sorted(set().union(*(table.reach[i] for i in numbers)))
        assert torch.equal(part.prompts, table.prompts[rows])
        torch.testing.assert_close(toy_tasks.proof_p(random_policy(part, logits[rows]), part), p[[*numbers]])


def test_each_n_wins_at_its_own_budget_on_theorems_solved_by_hand():
    """Goal c from a→c and b→c, and nine times in ten from a, else from b, which the policy cannot see: it chooses a→c
    with probability q. So p is q nine times and 1 - q once: N = 1 tends to q = 0.9, N = 8 to where the theory says."""
    table = toy_tasks.proof_table([((("a", "c"), ("b", "c"), atom), "c") for atom in "ab"])
    often, reached = torch.tensor([0] * 9 + [1]), {}
    for N in (1, 8):
        logits = torch.zeros(table.applicable.shape[1], dtype=torch.float64, requires_grad=True)
        for _ in range(1500):
            p = toy_tasks.proof_p(random_policy(table, logits.expand(len(table.prompts), -1)), table)
            gradient, = torch.autograd.grad(passn.LOSSES["limited"](p[often].log(), N), logits)
            with torch.no_grad():
                logits -= 2 * gradient
        assert p.tolist() == pytest.approx(limited_policy([0.9, 0.1], N), abs=1e-3)
        reached[N] = {n: pass_at_n(p[often].detach(), n).mean().item() for n in (1, 8)}
    assert reached[1][1] > reached[8][1] + 0.1 and reached[8][8] > reached[1][8] + 0.01


def test_blind_search_and_the_greedy_attempt_by_the_same_recursion():
    table = TASKS["prove"](6, 3, 12).test
    uniform = table.applicable / table.applicable.sum(1, keepdim=True).double()
    torch.testing.assert_close(toy_tasks.proof_p(uniform, table), table.blind, rtol=1e-9, atol=0)
    assert 0 < table.blind.max() <= 0.05
    sure = F.one_hot(uniform.argmax(1), uniform.shape[1]).double()
    assert toy_tasks.proof_p(sure, table, failure=1.0).tolist() == [1.0] * 12


def renamings(theorem):
    """The theorem under every renaming of its atoms, its hypotheses as a set."""
    def rename(formula, new):
        return new[formula] if isinstance(formula, str) else (rename(formula[0], new), rename(formula[1], new))
    for order in itertools.permutations(ATOMS):
        new = dict(zip(ATOMS, order))
        yield frozenset(rename(h, new) for h in theorem[0]), rename(theorem[1], new)


def test_theorems_are_hard_distinct_and_the_same_for_the_same_seed():
    """No two are the same under any renaming of their atoms: of the default seed's 600, by their smallest name."""
    (train_set, test_set), again, other = (toy_tasks.draw_theorems(seed, 20, 10) for seed in (3, 3, 4))
    assert (train_set, test_set) == again != other and len(test_set) == 10
    for theorem in train_set + test_set:
        length, _, blind = toy_tasks.solve(theorem)
        assert length < math.inf and 0 < blind <= toy_tasks.MAX_BLIND
    forms = {frozenset(renamings(theorem)) for theorem in sum(toy_tasks.draw_theorems(0, 60, 30), [])}
    assert len(forms) == 90


def test_the_model_reads_all_of_a_state():
    theorem = ((("a", "b"), ("c", "d")), "a"), ("b", "d")
    assert "".join(toy_tasks.state_tokens(theorem)) == "(ab)cd1a2⊢bd"
    assert [toy_tasks.pretty(formula) for formula in (*theorem[0], theorem[1])] == ["(a→b)→c→d", "a", "b→d"]
    task = TASKS["prove"](0, 4, 4)
    theorem, row, tactic = task.steps.unbind(dim=1)
    assert task.train.applicable[row, tactic].all() and set(theorem.tolist()) == {0, 1, 2, 3}


# ---- MATH ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solution, content, integer", [
    (r"so $\boxed{5}$.", "5", "5"),
    (r"$\boxed{-12}$ is it", "-12", "-12"),
    (r"first \boxed{1}, then \boxed{2}", "2", "2"),
    (r"$\boxed{\frac{1}{\sqrt{2}}}$", r"\frac{1}{\sqrt{2}}", None),
    (r"$\boxed 5$", "5", "5"),
    (r"thus $\boxed -7 $", "-7", "-7"),
    (r"\fbox{42}", "42", "42"),
    (r"$\boxed{007}$", "007", "7"),
    (r"$\boxed{1000}$", "1000", None),
    (r"$\boxed{3.5}$", "3.5", None),
    (r"\boxed{$11$}", "$11$", "11"),
    (r"$\boxed{3", None, None),
    ("no answer", None, None),
    (r"\boxed", "", None),
])
def test_answers_are_read_from_the_last_box(solution, content, integer):
    assert toy_tasks.boxed(solution) == content
    assert toy_tasks.integer_answer(solution) == integer


def problem(question, answer):
    return {"problem": question, "level": "Level 1", "type": "Algebra", "solution": f"It is $\\boxed{{{answer}}}$."}


MATH = {"train": [problem("What is $1+1$?", 2), problem("What is $2+3$?", 5), problem("Find $x$ in $x=2$.", 2),
                  problem("[asy] a picture [/asy]", 3), problem("word " * 65, 4), problem("What is a half?", r"\frac12")],
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
    assert (task.train[1][0].tolist()[1:]) == [END, PAD, PAD, PAD]
    assert task.answer_frequencies.tolist() == pytest.approx([2 / 3, 1 / 3]) and task.test_answer_index.tolist() == [0, -1, 1]
    assert passn.guess_pass_at_n(task, lambda p, N: p, 2) == pytest.approx((8 / 9 + 0 + 5 / 9) / 3)


def test_math_reads_the_original_release_and_the_datasets_package_alike(math_dir, tmp_path, monkeypatch):
    release = tmp_path / "release"
    for split, problems in MATH.items():
        folder = release / split / "algebra"
        folder.mkdir(parents=True)
        for i, example in enumerate(problems, 1):
            (folder / f"{i * 5}.json").write_text(json.dumps(example))
    def load_dataset(name, subject, split):
        return MATH[split] if subject == "algebra" else []

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    expected = TASKS["math"](0, math_dir)
    for task in (TASKS["math"](0, release), TASKS["math"](0)):
        assert task.vocab == expected.vocab and task.data == expected.data
        assert all(torch.equal(a, b) for a, b in zip((*task.train, *task.test), (*expected.train, *expected.test)))


def test_math_on_the_real_dataset():
    if not (SHARED / "math").exists():
        pytest.skip("no copy of MATH on this machine")
    task = TASKS["math"](0, SHARED / "math")
    assert len(task.train[0]) == 3022 and len(task.test[0]) == 1050  # counted once by other code
    assert passn.guess_pass_at_n(task, lambda p, N: p, 64) == pytest.approx(0.532, abs=1e-3)
    assert passn.guess_pass_at_n(task, optimal_policy, 64) == pytest.approx(0.579, abs=1e-3)


# ---- 6. theory -------------------------------------------------------------------------------------------


def test_optimal_policy_at_its_limits():
    p = np.array([0.5, 0.3, 0.2, 0.0])
    assert optimal_policy(p, 1).tolist() == [1, 0, 0, 0]
    assert optimal_policy([0.4, 0.4, 0.2], 1).tolist() == [0.5, 0.5, 0]
    assert optimal_policy(p, 1_000_000) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=1e-5)
    assert optimal_policy([7], 64).tolist() == limited_policy([7], 64).tolist() == [1]


@pytest.mark.parametrize("N", [2, 8, 64, 100_000])
@pytest.mark.parametrize("p", [[0.7, 0.2, 0.1], [0.5, 0.5, 0.0], [1 - 1e-9, 1e-9],
                               *np.random.default_rng(0).dirichlet(np.full(30, 0.3), 3)])
def test_policies_meet_their_kkt_conditions(p, N):
    p = np.asarray(p)
    best, limited = optimal_policy(p, N), limited_policy(p, N)
    for q in (best, limited):
        assert q.sum() == pytest.approx(1, abs=1e-9) and q.min() >= 0 and not q[p == 0].any()
    slope = np.log(p[best > 1e-12]) + (N - 1) * np.log1p(-np.minimum(best[best > 1e-12], 1 - 1e-15))
    if best.max() < 1 - 1e-9:
        assert np.ptp(slope) < 1e-4  # kept answers: equal marginal gain …
        assert (np.log(p[(best == 0) & (p > 0)]) <= slope.min() + 1e-4).all()  # … and none given up has more
    log_fail = np.log1p(-np.minimum(limited[p > 0], 1 - 1e-15))
    pull = np.log(p[p > 0]) + (N - 1) * log_fail - np.log(-np.expm1(N * log_fail))
    if limited.max() < 1 - 1e-6:
        assert np.ptp(pull) < 1e-6


def test_limited_policy_is_cross_entropys_for_one_try_and_never_gives_up():
    p = np.array([0.6, 0.3, 0.1 - 1e-6, 1e-6, 0])
    assert limited_policy(p, 1) == pytest.approx(p, abs=1e-15)
    q = limited_policy(p, 64)
    assert q[3] > 0 and q[4] == 0 and q[0] / q[1] < 2 * q[1] / q[2]
    assert optimal_policy(p, 8)[3] == 0 < limited_policy(p, 8)[3]
    many = limited_policy(np.random.default_rng(0).dirichlet(np.ones(20_000)), 1_000_000)  # in a moment
    assert many.sum() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("N", [2, 64])
def test_no_policy_has_a_smaller_limited_loss(N):
    random = np.random.default_rng(N)
    p = random.dirichlet(np.ones(20))
    value = lambda q: float(p @ dco_loss(torch.tensor(np.log(q)), N).numpy())
    best = limited_policy(p, N)
    for rival in (p, *random.dirichlet(np.ones(20), 50)):
        for share in (1, 0.1, 1e-3):
            assert value(share * rival + (1 - share) * best) >= value(best) - 1e-9


@pytest.mark.parametrize("a, K", [(0.1, 500), (0.5, 3), (0.9, 1000)])
@pytest.mark.parametrize("N", [1, 2, 8, 64, 512])
def test_the_one_parameter_picture_holds_the_optimum(a, K, N):
    c = np.linspace(0, 1, 200_001)
    values = passn.confident_pass_at_n(c, N, a, K)
    grid = c[values >= values.max() - 1e-15]  # one point, but where pass@N is 1 to the last digit over a stretch
    assert grid[0] - 1e-4 <= optimal_policy([a] + [(1 - a) / (K - 1)] * (K - 1), N)[0] <= grid[-1] + 1e-4
    assert passn.confident_pass_at_n(1.0, N, a, K).item() == pytest.approx(a)


@pytest.mark.parametrize("loss, policy", [("ce", lambda p, N: p), ("limited", limited_policy),
                                          ("reward", optimal_policy)])
@pytest.mark.parametrize("N", [2, 8])
def test_descent_on_bare_logits_ends_where_the_theory_says(loss, policy, N):
    """A hundred problems alike, whose labels come as often as p says, and one row of logits for all of them."""
    counts, logits = torch.tensor([50, 25, 15, 8, 2]), torch.zeros(5, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(5).repeat_interleave(counts)
    for _ in range(3000):
        gradient, = torch.autograd.grad(passn.LOSSES[loss](logits.log_softmax(0)[labels], N), logits)
        with torch.no_grad():
            logits -= 3 * gradient
    assert logits.softmax(0).tolist() == pytest.approx(policy(counts / 100, N), abs=2e-3)


# ---- 5. training -----------------------------------------------------------------------------------------


def without_times(run):
    return run | {"history": [record | {"seconds": 0} for record in run["history"]]}


@pytest.mark.parametrize("name, changes", [
    ("multiply", {}), ("cot", {}), ("prove", {}), ("prove", {"per_step": True}), ("search", {"reinforce": 4})])
def test_same_seed_same_run(name, changes, tiny):
    task, loss = TASKS[name](0), "reward" if "reinforce" in changes else "limited"
    runs = [without_times(train(task, loss, 4, seed, **changes)[0]) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_a_run_is_as_described(tiny, tmp_path):
    run, _ = train(TASKS["multiply"](0), "limited", 50, out=tmp_path / "new folder", epochs=3, evaluations=3)
    path, = (tmp_path / "new folder").iterdir()
    assert path.name == "multiply-limited-N50-epochs=3-evaluations=3-seed0.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(run)) and run["label"] == "limited N=50, epochs=3, evaluations=3"
    assert [record["epoch"] for record in run["history"]] == [0, 1, 2, 3]
    assert {"task", "loss", "N", "seed", "label", "config", "history", "problems", "rivals", "example"} <= {*run}
    assert 0 < run["history"][1]["seconds"] <= run["history"][-1]["seconds"]
    assert [record["updates"] for record in run["history"]] == [0, 2, 4, 6]
    last, p = run["history"][-1], torch.tensor(run["problems"]["p"])
    for n in (1, 8, 50, 64, 512):
        assert last["test"][f"pass@{n}"] == pytest.approx(pass_at_n(p, n).mean().item())
    assert last["test"]["confidence"] == pytest.approx(np.mean(run["problems"]["confidence"]))
    assert set(last["tempered"]) == {"0.7", "1", "1.3", "1.6", "2", "2.5"} and last["tempered"]["1"] == last["test"]
    assert set(last["train"]) == set(last["test"]) == set(last["tempered"]["0.7"])
    best = pass_at_n(torch.tensor(run["problems"]["best"]["p"]), 64).mean().item()
    assert best == pytest.approx(max(test["pass@64"] for test in records_of(run)))


@pytest.mark.parametrize("name", ["multiply", "cot", "prove", "search"])
def test_one_problem_is_enough(name, tiny):
    run, _ = train(TASKS[name](0, num_train=3, num_test=1), "limited", 1_000_000)
    assert 0 <= records_of(run)[-1]["pass@64"] <= 1
    assert ("pass@1000000" in records_of(run)[-1]) == (name != "cot")
    assert len(run["example"]) == 1 and len(run["example"][0][2]) == 64


def test_the_schedule_rises_and_falls():
    rates = [passn.schedule(i / 1000) for i in range(1001)]
    assert rates[0] == 0.01 and max(rates) == pytest.approx(1, abs=0.02) and rates[-1] == pytest.approx(0.1)
    assert rates.index(max(rates)) == pytest.approx(50, abs=1)


def test_solved_examples_are_passed_over_and_batches_filled_up(tiny, monkeypatch):
    """Even examples are solved. So each step sees batch_size odd ones, and there are half as many steps."""
    task, seen = TASKS["multiply"](0), []

    class HalfSolved(passn.Answers):
        def log_p(self, model, batch):
            solved = (batch % 2 == 0).float() * 100
            return super().log_p(model, batch).clamp(max=-1e-3) * 0.01 ** (solved / 100) if solved.any() else (
                super().log_p(model, batch))

        def objective(self, model, batch, loss, N):
            seen.append(batch)
            return super().objective(model, batch, loss, N)

    monkeypatch.setitem(passn.KINDS, "answers", HalfSolved)
    settings = {"epochs": 4, "batch_size": 20, "evaluations": 1}
    run, _ = train(task, "limited", 64, **settings)
    assert all(len(batch) == 20 and (batch % 2 == 1).all() for batch in seen) and len(seen) == 20
    assert run["history"][-1]["updates"] == 20
    for loss, N, changes in (("ce", 64, {}), ("limited", 1, {}), ("limited", 64, {"pass_over": 0.0}), ("reward", 64, {})):
        assert train(task, loss, N, **settings | changes)[0]["history"][-1]["updates"] == 40  # over none


def test_where_all_is_solved_the_model_stays_as_it_was(tiny, monkeypatch):
    monkeypatch.setattr(passn.Answers, "log_p", lambda self, model, batch: 0 * model.head.weight.sum() - 1e-3 * (batch + 1) / (batch + 1))
    run, model = train(TASKS["multiply"](0), "limited", 64)
    torch.manual_seed(0)
    untrained = GPT(len(TASKS["multiply"]().vocab), 10, n_layer=1, n_head=2, n_embd=16)
    assert run["history"][-1]["updates"] == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untrained.parameters()))


def test_the_factor_at_which_examples_are_passed_over():
    """F(64, p) < 0.1 from p of about 4/64 on."""
    p = torch.tensor([3.4, 3.8]) / 64
    assert (overconfidence_factor(p.log(), 64) < 0.1).tolist() == [False, True]


def test_a_run_on_proofs_has_their_shapes(tiny):
    run, _ = train(TASKS["prove"](0), "limited", 64)
    problems = run["problems"]
    assert {*problems} == {"p", "confidence", "best", "length", "branching", "blind"}
    assert {len(problems[name]) for name in problems if name != "best"} == {6}
    assert records_of(run)[-1]["pass@512"] == pytest.approx(pass_at_n(problems["p"], 512).mean().item())


def test_training_that_diverges_says_so_and_keeps_what_was_measured(tiny, tmp_path, capsys):
    arguments = ["--task", "cot", "--loss", "ce", "--weight-decay", "1e6", "--epochs", "20", "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert "diverged: try a smaller" in capsys.readouterr().err and [*tmp_path.glob("*.partial")]


def test_the_effect_on_proofs_in_miniature():
    """The theorem's p holds the imitation back, with N the attempts at the whole theorem."""
    task, small = TASKS["prove"](1, 40, 40), {"epochs": 40, "evaluations": 5, "batch_size": 25, "n_layer": 1, "n_embd": 48}
    ce, limited = ([test["pass@64"] for test in records_of(train(task, loss, 64, seed=1, **small)[0])]
                   for loss in ("ce", "limited"))
    assert ce[-1] < 0.9 * max(ce) and limited[-1] > 1.05 * ce[-1]
    assert max(ce) > 1.3 * pass_at_n(task.test.blind, 64).mean()  # it learned, too


@pytest.mark.parametrize("changes", [{}, {"reinforce": 64}])
def test_the_disease_and_the_cure_in_reinforcement_learning(changes):
    """With N = 1 pass@1 rises and pass@64 falls; with N = 64 it stays. Exactly, and from sampled attempts."""
    task, small = TASKS["search"](1, 40, 40), {"epochs": 12, "batch_size": 5, "n_layer": 1, "n_embd": 32} | changes
    one, many = (records_of(train(task, "reward", N, **small)[0]) for N in (1, 64))
    assert one[-1]["pass@64"] < 0.95 * max(test["pass@64"] for test in one)
    assert many[-1]["pass@64"] > 0.95 * max(test["pass@64"] for test in many)
    assert many[-1]["pass@64"] > 1.05 * one[-1]["pass@64"] and one[-1]["confidence"] > many[-1]["confidence"]


# ---- 7. tables and figures -------------------------------------------------------------------------------


def is_drawn(path):
    pixels = plt.imread(path)[..., :3]
    return pixels.shape[0] > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_main_trains_saves_and_draws_every_saved_run(tiny, tmp_path, capsys):
    assert main(["--loss", "limited", "--out", str(tmp_path)]) == 0
    assert main(["--loss", "ce", "--tries", "10", "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "multiply-limited-N64-seed0.json", "multiply-ce-N1-seed0.json", "multiply-ce-N1-seed1.json", "multiply.png"}
    said = capsys.readouterr().out.split("Figure")[-1]
    rows = {name: next(line for line in said.splitlines() if line.startswith(f"{name}  "))
            for name in ("cross-entropy", "limited N=64")}
    assert "±" in rows["cross-entropy"] and "±" not in rows["limited N=64"] and " nan" in rows["limited N=64"]
    runs = [json.loads((tmp_path / f"multiply-ce-N1-seed{seed}.json").read_text())["history"] for seed in (0, 1)]
    ends = [history[-1]["test"]["pass@512"] for history in runs]
    assert f"{np.mean(ends):.3f}±{abs(ends[0] - ends[1]) / 2:.3f}".replace("0.", ".") in rows["cross-entropy"]
    best = np.mean([max(test["pass@10"] for record in history for test in record["tempered"].values())
                    for history in runs])
    assert f"{best:.3f}±".replace("0.", ".") in rows["cross-entropy"].rsplit("  ", 1)[1]
    assert is_drawn(tmp_path / "multiply.png") and max(map(len, said.split("64 tries")[0].splitlines()[1:])) <= 110


def test_tries_are_shown_problem_by_problem_and_loss_by_loss(tiny, tmp_path, capsys):
    assert main(["--epochs", "30", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out.split("64 tries at the first three test problems:\n")[1].splitlines()
    task = TASKS["multiply"](0)
    assert said[::3] == [prompt + answer for prompt, answer in zip(texts(task, task.test[0][:3]), texts(task, task.test[1][:3]))]
    run = json.loads(next(tmp_path.glob("*limited*.json")).read_text())
    problem, num_right, tries = run["example"][0]
    (commonest, count), = Counter(tries).most_common(1)
    assert said[2].startswith(f"  limited N=64, epochs=30: {num_right} right; {count} × {commonest}")
    assert num_right == tries.count(problem.split("=")[1]) and len(tries) == 64


def test_a_new_loss_is_one_line(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(passn.LOSSES, "focal", lambda log_p, N: -((1 - log_p.exp()) ** 2 * log_p).mean())
    for loss in ("ce", "focal"):
        assert main(["--loss", loss, "--out", str(tmp_path)]) == 0
    assert "focal N=64" in capsys.readouterr().out and is_drawn(tmp_path / "multiply.png")


def test_main_draws_the_frontier(tiny, tmp_path):
    for task in ("multiply", "prove", "search"):
        assert main(["--task", task, "--frontier", "--epochs", "0", "--out", str(tmp_path)]) == 0
        assert is_drawn(tmp_path / f"{task}-frontier.png")
    names = {path.name.replace("-epochs=0-seed0.json", "") for path in tmp_path.glob("*.json")}
    assert names == {"multiply-ce-N1", "prove-ce-N1", *(f"{task}-limited-N{N}" for task in ("multiply", "prove") for N in (8, 64, 512)),
                     *(f"prove-limited-N{N}-epochs=0-per_step=True-seed0.json" for N in (2, 4, 8)),
                     *(f"search-reward-N{N}" for N in (1, 8, 64, 512))}


def test_main_on_math_shows_the_guessers(tiny, tmp_path, math_dir, capsys):
    assert main(["--task", "math", "--math-dir", str(math_dir), "--loss", "all", "--out", str(tmp_path / "out")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("guess")]
    policies = (lambda p, N: p, limited_policy, optimal_policy)
    for row, policy in zip(rows, policies, strict=True):
        task = TASKS["math"](0, math_dir)
        assert row[-4:] == [f"{passn.guess_pass_at_n(task, policy, N):.3f}" for N in (1, 8, 64, 512)]
    assert is_drawn(tmp_path / "out" / "math.png") and len(list((tmp_path / "out").glob("*.json"))) == 3


def test_other_problems_are_another_run_never_averaged(tiny, tmp_path, math_dir, capsys):
    arguments = ["--task", "math", "--loss", "ce", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--math-dir", str(math_dir)]) == 0
    (math_dir / "train.jsonl").write_text(json.dumps(problem("What is $1+2$?", 3)))
    assert main([*arguments, "--math-dir", str(math_dir), "--seed", "1"]) == 0
    assert len([*(tmp_path / "out").glob("math-ce-N1-data=*.json")]) == 2
    assert "±" not in capsys.readouterr().out


def test_runs_of_other_settings_are_neither_overwritten_nor_averaged(tiny, tmp_path, capsys):
    for changes in ([], ["--num-traces", "2"], ["--weight-decay", "0.5"], ["--weight-decay", "0.5000001"]):
        assert main(["--task", "cot", "--loss", "limited", "--epochs", "1", *changes, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.json")} == {
        f"cot-limited-N64-{changes}-seed0.json" for changes in
        ("epochs=1", "epochs=1-num_traces=2", "epochs=1-weight_decay=0.5", "epochs=1-weight_decay=0.5000001")}
    table = capsys.readouterr().out.split("Figure")[-1]
    assert "limited N=64, epochs=1, num_traces=2 " in table and "±" not in table


def test_a_run_is_not_renamed_when_settings_change(tiny, tmp_path, monkeypatch, capsys):
    """A student edits SETTINGS: the old run keeps its file and its row."""
    assert main(["--loss", "ce", "--out", str(tmp_path)]) == 0
    monkeypatch.setitem(passn.SETTINGS, "multiply", passn.SETTINGS["multiply"] | {"n_embd": 8})
    assert main(["--loss", "ce", "--seed", "1", "--out", str(tmp_path)]) == 0
    assert "±" not in capsys.readouterr().out.split("Figure")[-1]


def damaged(run, how):
    last = run["history"][-1]
    if how == "no test":
        del last["test"]
    if how == "no pass@64":
        del last["tempered"]["1"]["pass@64"], last["test"]["pass@64"]
    if how == "a text":
        last["tempered"]["1"]["pass@64"] = "many"
    if how == "a record too many":
        run["history"].append(last)
    if how == "a temperature":
        last["tempered"]["abc"] = last["test"]
    if how == "no confidence":
        run["history"][0]["test"]["confidence"] = {}
    return json.dumps(run)


@pytest.mark.parametrize("how", ["no test", "a text", "a record too many", "a temperature", "no confidence", "no pass@64"])
def test_a_bad_run_costs_no_other(how, tiny, tmp_path, capsys):
    assert main(["--loss", "ce", "--out", str(tmp_path)]) == 0
    path = tmp_path / "multiply-ce-N1-seed0.json"
    (tmp_path / "multiply-ce-N1-seed7.json").write_text(damaged(json.loads(path.read_text()), how))
    capsys.readouterr()
    assert main(["--loss", "limited", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "cross-entropy" in said.out and "limited N=64" in said.out
    assert ("multiply-ce-N1-seed7.json" in said.err) == (how != "no pass@64")  # that is no more than not measured


@pytest.mark.parametrize("content", ["{", "[]", "{}", "[" * 100_000, '{"task": "multiply", "loss": "ce"}', "\0"])
def test_a_file_that_is_no_run_is_named_and_left_out(content, tiny, tmp_path, capsys):
    (tmp_path / "multiply-ce-N1-seed9.json").write_text(content)
    assert main(["--loss", "limited", "--epochs", "0", "--out", str(tmp_path)]) == 0
    assert "multiply-ce-N1-seed9.json" in capsys.readouterr().err


def test_too_few_samples_for_the_tries_get_one_line(tiny, tmp_path, capsys):
    assert main(["--task", "cot", "--loss", "ce", "--tries", "512", "--out", str(tmp_path)]) == 0
    assert "pass@512 cannot be estimated from so few samples; shown is pass@64" in capsys.readouterr().out


def test_the_theory_is_drawn_without_training(tmp_path):
    assert main(["--theory", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["theory.png"] and is_drawn(tmp_path / "theory.png")


def test_in_a_notebook_figures_are_shown(monkeypatch, capsys, tmp_path):
    shown = []
    display = types.SimpleNamespace(Image=str, display=shown.append)
    for name, module in (("ipykernel", None), ("IPython", types.SimpleNamespace()), ("IPython.display", display)):
        monkeypatch.setitem(sys.modules, name, module)
    passn.save_and_show(plt.figure(), tmp_path / "figure.png")
    assert shown == [str(tmp_path / "figure.png")] and capsys.readouterr().out == f"Figure: {tmp_path / 'figure.png'}\n"


# ---- 8. command line -------------------------------------------------------------------------------------


def run_program(*arguments, **more):
    return subprocess.Popen([sys.executable, ROOT / "passn.py", *map(str, arguments)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **more)


SMALL = ["--n-layer", "1", "--n-embd", "16", "--evaluations", "1"]


def test_runs_side_by_side_are_those_one_by_one(tmp_path):
    """As a program, in processes of its own, against `train` in this one."""
    side_by_side = run_program(*SMALL, "--epochs", "2", "--out", tmp_path)
    settings = {"n_layer": 1, "n_embd": 16, "evaluations": 1, "epochs": 2}
    alone = {loss: train(TASKS["multiply"](), loss, **settings)[0] for loss in ("ce", "limited")}
    said, errors = side_by_side.communicate(timeout=120)
    assert side_by_side.returncode == 0, errors
    assert is_drawn(tmp_path / "multiply.png") and "64 tries" in said
    for run in alone.values():
        saved = json.loads((tmp_path / f"{run['file']}.json").read_text())
        assert without_times(saved) == without_times(json.loads(json.dumps(run)))


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_ctrl_c_ends_all_runs_and_keeps_what_was_measured(tmp_path):
    program = run_program(*SMALL, "--evaluations", "1000", "--epochs", "100000", "--out", tmp_path, start_new_session=True)
    deadline = time.time() + 90
    while len([*tmp_path.glob("*.partial")]) < min(2, os.cpu_count()) and time.time() < deadline:
        time.sleep(0.2)
    os.killpg(program.pid, signal.SIGINT)
    said, errors = program.communicate(timeout=60)
    assert program.returncode == -signal.SIGINT and "Interrupted" in errors and "Traceback" not in errors  # so a loop ends
    partial = [*tmp_path.glob("*.partial")]
    assert partial and all(json.loads(path.read_text())["history"] for path in partial) and not [*tmp_path.glob("*.json")]


@pytest.mark.parametrize("when", ["train", "draw", "draw_theory"])
def test_ctrl_c_at_any_time_gets_one_line(when, tiny, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(passn, when, interrupt)
    assert main([*["--theory"] * (when == "draw_theory"), "--out", str(tmp_path)]) == 130
    said = capsys.readouterr().err
    assert "Interrupted" in said and "Traceback" not in said


def test_unfinished_runs_are_kept_apart(tiny, tmp_path, monkeypatch, capsys):
    """They are no rows, and take no finished run's place. Two writers of the same run do not meet."""
    assert main(["--loss", "limited", "--out", str(tmp_path)]) == 0
    finished = (tmp_path / "multiply-limited-N64-seed0.json").read_text()
    run = json.loads(finished)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    passn.save(run | {"seed": 5}, tmp_path, finished=False)
    monkeypatch.setattr(os, "getpid", lambda: 2)
    passn.save(run | {"seed": 6}, tmp_path, finished=False)
    assert [json.loads((tmp_path / f"multiply-limited-N64-seed0-{pid}.partial").read_text())["seed"] for pid in (1, 2)] == [5, 6]
    assert (tmp_path / "multiply-limited-N64-seed0.json").read_text() == finished
    assert len(passn.load_runs(tmp_path, "multiply", "", 64)) == 1


def test_a_full_disk_gets_one_line_and_loses_nothing(tiny, tmp_path, monkeypatch, capsys):
    run, _ = train(TASKS["multiply"](0), "ce", out=tmp_path)
    passn.save(run, tmp_path, finished=False)
    write = Path.write_text

    def full(path, text, **more):
        write(path, text[:100], **more)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit) as stop:
        main(["--loss", "ce", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "No space left on device" in capsys.readouterr().err
    for path in tmp_path.iterdir():
        assert json.loads(path.read_text())["history"]


def test_whoever_reads_only_a_line_gets_a_quiet_end(tmp_path):
    program = run_program("--loss", "ce", *SMALL, "--epochs", "0", "--out", tmp_path)
    program.stdout.close()
    errors = program.stderr.read()
    assert program.wait(timeout=60) == 0 and "Broken" not in errors and is_drawn(tmp_path / "multiply.png")


def test_without_a_console_runs_go_on_without_a_bar(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--task", "search", "--loss", "reward", "--out", str(tmp_path)]) == 0 and is_drawn(tmp_path / "search.png")


def test_importing_has_no_effects():
    code = ("import os, sys; before = dict(os.environ); import passn, toy_tasks; "
            "assert 'matplotlib' not in sys.modules and dict(os.environ) == before")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def refused(arguments, capsys):
    """The one line on standard error, after checking that it is one and that the exit status is 2."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == "" and output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize("arguments, hint", [
    (["--N", "0"], "from 1"), (["--N", "-3"], "from 1"), (["--N", "1.5"], "int value"), (["--N", "x"], "int value"),
    (["--N", "1" * 5000], "--N"), (["--loss", "x"], "limited"), (["--task", "x"], "multiply"),
    (["--device", "x"], "auto"), (["--epochs", "-1"], "from 0"), (["--seeds", "0"], "from 1"), (["--nonsense"], "sense"),
    (["--weight-decay", "nan"], "from 0"), (["--weight-decay", "-1"], "from 0"), (["--n-embd", "31"], "multiple"),
    (["--num-traces", "8"], "--task multiply"), (["--task", "prove", "--resample-every", "1"], "--task prove"),
    (["--task", "cot", "--num-traces", "0"], "from 1"), (["--out", Path(__file__) / "x"], "Not a directory"),
    (["--theory", "--seeds", "7"], "--seeds"), (["--frontier", "--loss", "ce"], "--loss"), (["--batch-size", "0"], "from 1"),
    (["--math-dir", "x"], "--task multiply"), (["--task", "search", "--loss", "ce", "--reinforce", "4"], "--loss reward"),
    (["--task", "math", "--math-dir", "/nowhere"], "train.jsonl")])
def test_bad_arguments_get_one_line(arguments, hint, tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hint in refused(arguments, capsys)


def test_every_setting_is_a_flag(tiny, monkeypatch, tmp_path):
    caught = {}
    monkeypatch.setattr(passn, "train", lambda **job: caught.update(job) or (_ for _ in ()).throw(KeyboardInterrupt))
    for task, settings in passn.SETTINGS.items():
        flags = []
        for name, value in settings.items():
            if name != "math_dir":
                flags += [f"--{name.replace('_', '-')}"] + ([] if isinstance(value, bool) else [f"{value}"])
        if task != "math":
            assert main(["--task", task, *flags, "--out", str(tmp_path)]) == 130
            expected = settings | ({"per_step": True} if task == "prove" else {})
            assert {name: caught[name] for name in settings if name != "N"} == {k: v for k, v in expected.items() if k != "N"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_device_that_is_not_there_gets_one_line(capsys):
    assert "--device auto" in refused(["--device", "cuda"], capsys)


@pytest.mark.parametrize("content, hint", [
    (b"", "no MATH problems"), (b"{oops\n", "line 1"), (b'{"problem": "x"}\n', "'solution'"), (b"[1]\n", "'problem'"),
    (b'{"problem": 1, "solution": "x"}\n', "'problem'"), (b"\xff\xfe\n", "UTF-8"), (b"\xef\xbb\xbf{oops", "line 1"),
    (json.dumps(problem("What?", "x")).encode(), "no short question"),
])
def test_bad_math_files_get_one_line(content, hint, capsys, math_dir, tmp_path):
    (math_dir / "train.jsonl").write_bytes(content)
    assert hint in refused(["--task", "math", "--math-dir", math_dir, "--out", tmp_path / "out"], capsys)


def test_math_without_the_data_names_both_ways(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if not installed
    message = refused(["--task", "math", "--out", tmp_path], capsys)
    assert "datasets" in message and "--math-dir" in message


def test_math_without_network_gets_one_line(capsys, monkeypatch, tmp_path):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert "no route" in refused(["--task", "math", "--out", tmp_path], capsys)


def test_as_a_program_it_exits_with_2_and_no_traceback():
    done = subprocess.run([sys.executable, Path(passn.__file__), "--N", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["multiply", "cot", "prove", "search"])
def test_cuda_learns_what_the_cpu_learns(name, tiny):
    runs = [train(TASKS[name](0), "limited", 64, device=device)[0] for device in ("cpu", "cuda")]
    assert runs[0]["history"][-1]["loss"] == pytest.approx(runs[1]["history"][-1]["loss"], rel=1e-2)


# ---- the README ------------------------------------------------------------------------------------------

TEXTS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "exercises" / "README.md")}
README = TEXTS[ROOT / "README.md"]


def test_the_readmes_links_resolve():
    prose = {path: re.sub(r"```.*?```", "", text, flags=re.S) for path, text in TEXTS.items()}
    anchors = {path: {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                      for heading in re.findall(r"^#+ (.*)", text, re.M)} for path, text in prose.items()}
    links = [(path, link) for path, text in prose.items() for link in re.findall(r"\]\(([^)]+)\)", text)]
    assert any("#" in link for _, link in links) and (ROOT / "README.md", "assets/multiply.png") in links
    for path, link in links:
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.is_file() and (not anchor or anchor in anchors[target]), (path, link)


# What the README's lines for the Hugging Face Trainer leave to the reader: a model (a tiny Llama with random weights), and
# texts of 12 tokens of which the last 1 to 4 are the answer. The arguments come from outside, so that the lines run as
# they stand; a batch is the whole data, in one piece, in two, or on two processes.
BEFORE_TRAINER = """
import functools, json, os, sys
import torch, transformers
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
texts = torch.randint(16, (24, 12))
train_dataset = [{"input_ids": text, "labels": torch.where(torch.arange(12) < 11 - i % 4, -100, text)}
                 for i, text in enumerate(texts)]
start = {name: value.clone() for name, value in model.state_dict().items()}
defaults = dict(num_train_epochs=2, optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0,
                report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, **json.loads(sys.argv[1]))
transformers.TrainingArguments.__init__ = functools.partialmethod(transformers.TrainingArguments.__init__, **defaults)
"""
AFTER_TRAINER = """
if os.environ.get("RANK", "0") == "0":
    torch.save((texts, start, model.state_dict()), sys.argv[2])
if torch.distributed.is_initialized():  # else who ends first may abort the other
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("processes, arguments", [
    (1, {"per_device_train_batch_size": 24}),
    (1, {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 2}),
    (2, {"per_device_train_batch_size": 12})])
def test_the_readmes_trainer_takes_the_steps_of_a_loop_by_hand(processes, arguments, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    lines, = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "compute_loss_func" in block)
    assert lines.count("\n") <= 20
    script, result = tmp_path / "finetune.py", tmp_path / "result.pt"
    script.write_text(BEFORE_TRAINER + lines + AFTER_TRAINER)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    done = subprocess.run([sys.executable, *launcher, script, json.dumps(arguments), result], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    texts, start, trained = torch.load(result)

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    model.load_state_dict(start)
    for _ in range(2):
        log_probs = model(texts).logits.log_softmax(dim=-1)
        log_p = torch.stack([sum(log_probs[i, t - 1, text[t]] for t in range(11 - i % 4, 12))
                             for i, text in enumerate(texts)])
        gradients = torch.autograd.grad(dco_loss(log_p, 64).mean(), model.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients):
                parameter -= 0.5 * gradient
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-6)
        assert name.endswith("norm.weight") or not torch.equal(value, start[name])
