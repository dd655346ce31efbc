"""Tests against trusted references: exact arithmetic, brute force, sampling, and the effect itself in miniature."""

import ast
import csv
import functools
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import types
from collections import Counter
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when PyTorch is loaded: more threads gain nothing here, and wait for others

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import passn
import toy_tasks
from passn import (GPT, answer_log_p, answer_logits, coverage_loss, dco_loss, estimate_pass_at_n, limited_policy, main,
                   optimal_policy, overconfidence_factor, pass_at_n, sample, train)
from toy_tasks import ATOMS, END, PAD, TASKS

SHARED = Path(__file__).resolve().parent.parent / "shared"
TINY = passn.DEFAULTS | dict(epochs=2, learning_rate=1e-3, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def tiny(monkeypatch):
    """Every task with a tiny model and two epochs, for what does not depend on the size."""
    for name in passn.SETTINGS:
        own = {"prove": {"N": 4}, "cot": {"traces": 4, "interval": 1}}.get(name, {})
        monkeypatch.setitem(passn.SETTINGS, name, TINY | own)
    monkeypatch.setitem(TASKS, "cot", functools.partial(toy_tasks.cot, num_train=30, num_test=6))
    for name in ("prove", "search"):
        monkeypatch.setitem(TASKS, name, functools.partial(getattr(toy_tasks, name), num_train=6, num_test=6))


# ---- pass@N ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 2, 64, 1_000_000])
@pytest.mark.parametrize("p", ["0", "1e-12", "1e-6", "0.015625", "0.5", "0.999999", "1"])
def test_pass_at_n_is_exact(p, N):
    with localcontext(prec=60):
        exact = float(1 - (1 - Decimal(p)) ** N) if p != "1" else 1.0
    assert pass_at_n(float(p), N).item() == pytest.approx(exact, rel=1e-12, abs=0)


def test_pass_at_n_keeps_shapes_and_takes_empty_input():
    assert pass_at_n(torch.rand(3, 4), 8).shape == (3, 4)
    assert pass_at_n([], 8).shape == (0,)


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


def test_estimator_refuses_more_tries_than_samples():
    with pytest.raises(ValueError, match="draw at least N"):
        estimate_pass_at_n(10, 1, 11)
    for c in (-1, 11):
        with pytest.raises(ValueError, match="0 to 10"):
            estimate_pass_at_n(10, [0, c], 2)


# ---- the loss --------------------------------------------------------------------------------------------

LOG_PS = ["-2000", "-200", "-50.001", "-50", "-49.9", "-20", "-9", "-4.1", "-1", "-0.6931", "-0.1", "-1e-3", "-1e-6"]


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


@pytest.mark.parametrize("dtype, rel", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("N", [1, 2, 8, 64, 1_000_000])
def test_gradient_is_the_factor_times_that_of_cross_entropy(N, dtype, rel):
    log_p = torch.tensor([*map(float, LOG_PS)], dtype=dtype, requires_grad=True)
    dco_loss(log_p, N).sum().backward()
    torch.testing.assert_close(log_p.grad, -overconfidence_factor(log_p.detach(), N), rtol=rel,
                               atol=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_finite_even_where_p_is_1_or_underflows(dtype):
    log_p = torch.tensor([0.0, -1e-38, -1e-7, -1e4], dtype=dtype, requires_grad=True)
    for N in (1, 2, 64, 1_000_000):
        loss = dco_loss(log_p, N)
        gradient, = torch.autograd.grad(loss.sum(), log_p)
        assert loss.isfinite().all() and gradient.isfinite().all()


def test_one_try_is_cross_entropy_exactly():
    logits, labels = torch.randn(50, 10), torch.randint(10, (50,))
    log_p = torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    assert torch.equal(dco_loss(log_p, 1).mean(), passn.LOSSES["ce"](log_p, 64))
    torch.testing.assert_close(dco_loss(log_p, 1).mean(), F.cross_entropy(logits, labels))


def test_loss_takes_an_empty_batch_and_refuses_no_tries():
    assert dco_loss(torch.empty(0), 8).shape == (0,)
    for bad in (0, -3):
        with pytest.raises(ValueError, match="1 or more"):
            dco_loss(torch.tensor([-1.0]), bad)


# ---- the model and its measurement -----------------------------------------------------------------------


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
def test_padding_behind_an_answer_counts_nothing():
    model, prompt = small_model(), torch.tensor([[2, 3, 4]])
    short, padded = torch.tensor([[5, END]]), torch.tensor([[5, END, PAD, PAD]])
    torch.testing.assert_close(answer_log_p(answer_logits(model, prompt, short), short),
                               answer_log_p(answer_logits(model, prompt, padded), padded))


def measured_by(kind, model, prompts, answers, temperature, **attributes):
    task = toy_tasks.Task("", kind, [], 0, (prompts, answers), (prompts, answers), final=1)
    kind = passn.KINDS[kind](task, {}, 0, "cpu")
    kind.__dict__.update(attributes)
    return kind.measure(model, "test", [temperature])[temperature]


@torch.no_grad()
def test_confidence_is_the_probability_of_the_greedy_answer():
    model, prompts = small_model(), torch.randint(2, 7, (40, 5))
    answers = torch.randint(2, 7, (40, 3))
    _, confidence, _ = measured_by("answers", model, prompts, answers, 1.0)
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
def test_sampled_traces_agree_with_the_sum_over_all_traces(temperature):
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
    p, confidence, number = measured_by("traces", model, prompts, answers, temperature, samples={temperature: draws})
    for got, want in ((p, torch.stack(exact)), (confidence, torch.stack(greedy_share))):
        assert ((got - want).abs() < 4 * (want * (1 - want) / draws).sqrt() + 1e-9).all()
    estimate = passn.summary(p, confidence, number, [8])["pass@8"]
    assert estimate == pytest.approx(pass_at_n(torch.stack(exact), 8).mean().item(), abs=0.02)


def test_from_samples_there_is_no_pass_at_more_tries_than_samples():
    half = torch.tensor([0.5, 0.0])
    assert passn.summary(half, half, 4, [1, 2, 8]) == {"pass@1": 0.25, "confidence": 0.25,
                                                       "pass@2": pytest.approx(5 / 12)}


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
    assert min(orders.values()) > 100 and task.final == 4
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
        length, _, blind = toy_tasks.prospect(theorem)
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
        assert (toy_tasks.prospect(theorem, 12)[0] < math.inf) == provable, theorem
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


def test_proof_p_is_the_sum_over_all_proofs_and_agrees_with_sampled_attempts():
    table = TASKS["prove"](5, 3, 12).test
    torch.manual_seed(0)
    logits = 2 * torch.randn(table.applicable.shape, dtype=torch.float64)
    policy = torch.softmax(logits.masked_fill(~table.applicable, -torch.inf), -1)
    p, row = toy_tasks.proof_p(policy, table), {state: i for i, state in enumerate(table.states)}
    policy_of = lambda state, tactic: policy[row[state], toy_tasks.FIRST_TACTIC + tactic].item()
    for exact, i in zip(p.tolist(), table.theorems.tolist()):
        if table.states[i][0]:
            proofs = [*itertools.islice(all_proofs(table.states[i], policy_of, toy_tasks.MAX_DEPTH), 10**5)]
            assert len(proofs) == 10**5 or math.fsum(proofs) == pytest.approx(exact, rel=1e-9)
    i, generator, draws = p.argmax().item(), torch.Generator().manual_seed(0), 3000
    proofs = [toy_tasks.attempt_proof(policy, table, table.theorems[i].item(), generator) for _ in range(draws)]
    assert abs(np.mean([proof is not None for proof in proofs]) - p[i]) < 4 * (p[i] * (1 - p[i]) / draws).sqrt()
    proof = [(table.states[r], token - toy_tasks.FIRST_TACTIC) for r, token, _ in next(filter(None, proofs))]
    assert type_of(as_term(iter(proof)), proof[0][0][0]) == proof[0][0][1]


def random_policy(table, logits):
    return torch.softmax(logits.masked_fill(~table.applicable, -torch.inf), -1)


def test_the_gradient_of_p_is_that_of_the_sum_over_all_proofs():
    """Where they are few: every proof's probability as a product of choices, by autograd; and finite differences."""
    table, checked = TASKS["search"](5, 12, 1).train, 0
    torch.manual_seed(0)
    for number in range(12):
        part = toy_tasks.part_of(table, [number])
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
        part = toy_tasks.part_of(table, numbers)
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
    task, again, other = TASKS["prove"](3, 40, 20), TASKS["prove"](3, 40, 20), TASKS["prove"](4, 40, 20)
    for one, two in ((task, again), (task, other)):
        same = torch.equal(one.test.prompts, two.test.prompts)
        assert same == (two is again)
    assert torch.equal(task.train[1], again.train[1])
    first = {texts(task, prompt[None])[0] for prompt in task.train[0]}
    tests = [task.test.states[row] for row in task.test.theorems]
    assert len(tests) == 20 and not first & {"".join(toy_tasks.spell(theorem)) for theorem in tests}
    drawn, seen, pick = [], set(), random.Random(3)
    while len(drawn) < 60:
        theorem = toy_tasks.random_theorem(pick)
        length, _, blind = toy_tasks.prospect(theorem)
        if length < math.inf and blind <= toy_tasks.MAX_BLIND:
            drawn.append(theorem)
    for theorem in tests:
        assert theorem in drawn  # the generator's own order
    for theorem in drawn:
        assert not any(form in seen for form in renamings(theorem))
        seen.add((frozenset(theorem[0]), theorem[1]))


def test_the_fingerprint_forgets_names_and_order_and_nothing_else():
    pick, by_fingerprint = random.Random(0), {}
    for _ in range(200):
        hypotheses, goal = theorem = small_theorem(pick)
        shuffled = pick.sample(hypotheses, len(hypotheses))
        names = dict(zip(ATOMS, pick.sample(ATOMS, len(ATOMS))))
        rename = lambda f: names[f] if isinstance(f, str) else (rename(f[0]), rename(f[1]))
        assert toy_tasks.fingerprint(theorem) == toy_tasks.fingerprint((tuple(map(rename, shuffled)), rename(goal)))
        form = min(str((sorted(map(str, hyps)), goal)) for hyps, goal in renamings(theorem))
        assert by_fingerprint.setdefault(toy_tasks.fingerprint(theorem), form) == form


def test_the_model_reads_all_of_a_state():
    theorem = ((("a", "b"), ("c", "d")), "a"), ("b", "d")
    assert "".join(toy_tasks.spell(theorem)) == "(ab)cd1a2⊢bd"
    assert [toy_tasks.show(formula) for formula in (*theorem[0], theorem[1])] == ["(a→b)→c→d", "a", "b→d"]
    steps = TASKS["prove"](0, 4, 4).train
    chosen = steps[2].gather(1, steps[1])
    assert chosen.all() and (steps[2].sum(1) >= 1).all()  # the tactic of the proof is among those that apply


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
    assert task.guesses.tolist() == pytest.approx([2 / 3, 1 / 3]) and task.test_guess.tolist() == [0, -1, 1]
    assert passn.blind_pass_at_n(task, lambda p, N: p, 2) == pytest.approx((8 / 9 + 0 + 5 / 9) / 3)


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
        assert task.vocab == expected.vocab
        assert all(torch.equal(a, b) for a, b in zip((*task.train, *task.test), (*expected.train, *expected.test)))


def test_math_on_the_real_dataset():
    if not (SHARED / "math").exists():
        pytest.skip("no copy of MATH on this machine")
    task = TASKS["math"](0, SHARED / "math")
    assert len(task.train[0]) == 3022 and len(task.test[0]) == 1050  # counted once by other code
    assert passn.blind_pass_at_n(task, lambda p, N: p, 64) == pytest.approx(0.532, abs=1e-3)
    assert passn.blind_pass_at_n(task, optimal_policy, 64) == pytest.approx(0.579, abs=1e-3)


# ---- theory ----------------------------------------------------------------------------------------------


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


def test_optimal_policy_at_its_limits():
    p = np.array([0.5, 0.3, 0.2, 0.0])
    assert optimal_policy(p, 1).tolist() == [1, 0, 0, 0]
    assert optimal_policy([0.4, 0.4, 0.2], 1).tolist() == [0.5, 0.5, 0]
    assert optimal_policy(p, 1_000_000) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=1e-5)
    assert optimal_policy([7], 64).tolist() == [1]

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
    many = limited_policy(np.random.default_rng(0).dirichlet(np.ones(5000)), 1_000_000)
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
                                          ("coverage", optimal_policy)])
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


@pytest.mark.parametrize("dtype, rel", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_coverage_loss_is_minus_log_of_the_mean(dtype, rel):
    log_p = torch.tensor([-0.1, -1.0, -4.0, -9.0, -30.0], dtype=dtype)
    for N in (1, 8, 64, 1_000_000):
        plain = -math.log(pass_at_n(log_p.double().exp(), N).mean())
        assert coverage_loss(log_p, N).item() == pytest.approx(plain, rel=rel, abs=1e-15)
    hard = torch.tensor([-2000.0, -1999.0, 0.0 - 1e-6, -1990.0], dtype=dtype, requires_grad=True)
    for part in (hard[:2], hard):
        for N in (1, 64, 1_000_000):
            loss = coverage_loss(part, N)
            gradient, = torch.autograd.grad(loss, hard, retain_graph=True)
            assert loss.isfinite() and gradient.isfinite().all() and loss.dtype == dtype
    want = 1999 - math.log(64) + math.log(2) - math.log1p(math.exp(-1))
    assert coverage_loss(hard[:2], 64).item() == pytest.approx(want, rel=rel)


def test_main_draws_the_theory_without_training(tmp_path):
    assert main(["--theory", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["theory.png"] and is_drawn(tmp_path / "theory.png")


# ---- training, runs and figures --------------------------------------------------------------------------


def without_times(run):
    return run | {"history": [record | {"seconds": 0} for record in run["history"]]}


def test_same_seed_same_run(tiny):
    task = TASKS["multiply"](0, 200, 100)
    runs = [without_times(train(task, "limited", 64, seed)[0]) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_a_run_is_as_described(tiny, tmp_path):
    run, _ = train(TASKS["multiply"](0, 200, 100), "limited", 50, out=tmp_path, epochs=3)
    assert [path.name for path in tmp_path.iterdir()] == ["multiply-limited-N50-epochs=3-seed0.json"]
    assert json.loads((tmp_path / "multiply-limited-N50-epochs=3-seed0.json").read_text()) == run
    assert [record["epoch"] for record in run["history"]] == [0, 1, 2, 3]
    assert set(run) == {"task", "loss", "N", "seed", "config", "history", "problems", "rivals", "example"}
    assert 0 < run["history"][1]["seconds"] <= run["history"][-1]["seconds"]
    last, p = run["history"][-1], torch.tensor(run["problems"]["p"])
    for n in (1, 8, 50, 64, 512):
        assert last["test"][f"pass@{n}"] == pytest.approx(pass_at_n(p, n).mean().item())
    assert last["test"]["confidence"] == pytest.approx(np.mean(run["problems"]["confidence"]))
    assert set(last["tempered"]) == {"0.7", "1", "1.3", "1.6", "2", "2.5"} and last["tempered"]["1"] == last["test"]
    assert set(last["train"]) == set(last["test"]) == set(last["tempered"]["0.7"])


@pytest.mark.parametrize("name", ["multiply", "cot", "prove", "search"])
def test_one_problem_is_enough(name, tiny):
    run, _ = train(TASKS[name](0, num_train=3, num_test=1), "limited", 1_000_000)
    assert 0 <= run["history"][-1]["test"]["pass@64"] <= 1
    assert ("pass@1000000" in run["history"][-1]["test"]) == (name != "cot")


def test_with_no_right_trace_the_approximate_loss_is_cross_entropy(tiny):
    task = TASKS["cot"](0)
    ce, limited = (train(task, loss, 64)[0] for loss in ("ce", "limited"))
    assert limited["history"][-1]["test"] == ce["history"][-1]["test"] and "pass@512" not in ce["history"][0]["test"]
    assert limited["history"][-1]["loss"] == pytest.approx(ce["history"][-1]["loss"], rel=1e-6)


def test_right_traces_weigh_less(tiny, monkeypatch):
    """Where all sampled traces are right, F is 0 and the model stays as it was."""
    monkeypatch.setattr(passn, "right_traces", lambda model, prompts, answers, task, num_samples, *_: (
        answers[:, None].expand(-1, num_samples, -1), torch.ones(len(prompts), num_samples, dtype=torch.bool)))
    run, model = train(TASKS["cot"](0), "limited", 64)
    torch.manual_seed(0)
    untrained = GPT(len(TASKS["cot"](0).vocab), 20, n_layer=1, n_head=2, n_embd=16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untrained.parameters()))


@pytest.mark.parametrize("name", ["cot", "prove", "search"])
def test_same_seed_same_run_on_every_task(name, tiny):
    task = TASKS[name](0)
    assert without_times(train(task, "limited")[0]) == without_times(train(task, "limited")[0])


def test_a_run_on_proofs_has_their_shapes_and_the_steps_own_loss(tiny):
    task = TASKS["prove"](0)
    run, model = train(task, "limited", 4)
    problems, last = run["problems"], run["history"][-1]["test"]
    assert {*problems} == {"p", "confidence", "length", "branching", "blind"}
    assert {len(values) for values in problems.values()} == {6}
    assert last["pass@512"] == pytest.approx(pass_at_n(problems["p"], 512).mean().item())
    x, y, applicable = task.train
    logits = model(x)[:, -1].masked_fill(~applicable, -torch.inf)
    log_p = torch.log_softmax(logits, -1).gather(1, y)[:, 0]
    assert run["history"][-1]["loss"] == pytest.approx(dco_loss(log_p, 4).mean().item(), rel=1e-5)


def test_the_effect_in_miniature(monkeypatch):
    """Cross-entropy's pass@64 falls as it grows confident; the limited loss's falls less, and ends higher."""
    monkeypatch.setitem(passn.SETTINGS, "multiply",
                        TINY | dict(epochs=60, batch_size=25, learning_rate=3e-3, n_head=4, n_embd=64))
    task = TASKS["multiply"](0, 300, 300)
    (ce, _), (limited, _) = (train(task, loss, 64) for loss in ("ce", "limited"))
    ce_64, limited_64 = ([record["test"]["pass@64"] for record in run["history"]] for run in (ce, limited))
    assert ce_64[-1] < 0.6 * max(ce_64)
    assert limited_64[-1] > 1.4 * ce_64[-1]
    assert limited["history"][-1]["test"]["confidence"] < 0.6 * ce["history"][-1]["test"]["confidence"]


def test_the_effect_on_proofs_in_miniature(monkeypatch):
    monkeypatch.setitem(passn.SETTINGS, "prove",
                        passn.SETTINGS["prove"] | dict(epochs=30, evaluations=5, batch_size=25, n_layer=1, n_embd=48))
    task = TASKS["prove"](1, 40, 40)
    ce, limited = ([record["test"]["pass@64"] for record in train(task, loss, 4, seed=1)[0]["history"]]
                   for loss in ("ce", "limited"))
    assert ce[-1] < 0.85 * max(ce) and limited[-1] > 1.1 * ce[-1]
    assert max(ce) > 1.5 * pass_at_n(task.test.blind, 64).mean()  # it learned, too


def test_the_search_in_miniature(monkeypatch):
    """Trained as a search, pass@64 does not fall, and a small N goes for single attempts."""
    monkeypatch.setitem(passn.SETTINGS, "search", TINY | dict(epochs=6, evaluations=2, batch_size=5, learning_rate=5e-3,
                                                              n_layer=2, n_embd=32))
    task = TASKS["search"](1, 30, 30)
    one, many = ([record["test"] for record in train(task, "limited", N)[0]["history"]] for N in (1, 64))
    assert one[-1]["pass@1"] > many[-1]["pass@1"]
    assert many[-1]["pass@64"] > 0.95 * max(test["pass@64"] for test in many)
    assert many[-1]["pass@64"] > 1.5 * pass_at_n(task.test.blind, 64).mean()


def is_drawn(path):
    pixels = plt.imread(path)[..., :3]
    return pixels.shape[0] > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_main_trains_saves_and_draws_every_saved_run(tiny, tmp_path, capsys):
    assert main(["--loss", "limited", "--N", "64", "--out", str(tmp_path)]) == 0
    assert main(["--loss", "ce", "--N", "10", "--seeds", "2", "--out", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"multiply-limited-N64-seed0.json", "multiply-ce-N1-seed0.json", "multiply-ce-N1-seed1.json",
                     "multiply.png"}
    table = capsys.readouterr().out.split("Figure")[-2]
    rows = {name: next(line for line in table.splitlines() if line.startswith(f"{name}  "))
            for name in ("cross-entropy", "limited N=64")}
    assert "±" in rows["cross-entropy"] and "±" not in rows["limited N=64"]
    runs = [json.loads((tmp_path / f"multiply-ce-N1-seed{seed}.json").read_text())["history"] for seed in (0, 1)]
    ends = [history[-1]["test"]["pass@512"] for history in runs]
    assert f"{np.mean(ends):.3f}±{abs(ends[0] - ends[1]) / 2:.3f}" in rows["cross-entropy"]
    best = np.mean([max(test["pass@10"] for record in history for test in record["tempered"].values())
                    for history in runs])
    assert f"{best:.3f}±" in rows["cross-entropy"].rsplit("  ", 1)[1]
    assert is_drawn(tmp_path / "multiply.png")


def test_a_new_loss_is_one_line(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(passn.LOSSES, "focal", lambda log_p, N: -((1 - log_p.exp()) ** 2 * log_p).mean())
    for loss in ("ce", "focal"):
        assert main(["--loss", loss, "--out", str(tmp_path)]) == 0
    assert "focal N=64" in capsys.readouterr().out and (tmp_path / "multiply.png").stat().st_size > 20_000


def test_main_draws_the_frontier(tiny, tmp_path, capsys):
    assert main(["--frontier", "--out", str(tmp_path)]) == 0
    assert main(["--task", "prove", "--frontier", "--epochs", "0", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*-limited-*")} == {
        *(f"multiply-limited-N{N}-seed0.json" for N in (8, 64, 512)),
        *(f"prove-limited-N{N}-epochs=0-seed0.json" for N in (2, 4, 8))}
    assert is_drawn(tmp_path / "multiply-frontier.png") and is_drawn(tmp_path / "prove-frontier.png")


def test_main_on_math_shows_the_blind_guessers(tiny, tmp_path, math_dir, capsys):
    assert main(["--task", "math", "--math-dir", str(math_dir), "--loss", "all", "--out", str(tmp_path / "out")]) == 0
    rows = [line.rsplit(maxsplit=4) for line in capsys.readouterr().out.splitlines() if line.startswith("blind")]
    policies = (lambda p, N: p, optimal_policy, limited_policy)
    for row, policy in zip(rows, policies, strict=True):
        task = TASKS["math"](0, math_dir)
        assert row[1:] == [f"{passn.blind_pass_at_n(task, policy, N):.3f}" for N in (1, 8, 64, 512)]
    assert is_drawn(tmp_path / "out" / "math.png") and len(list((tmp_path / "out").glob("*.json"))) == 3


def test_main_on_proofs_prints_a_proof(tiny, tmp_path, capsys):
    assert main(["--task", "prove", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "blind search" in said and "pass@64 is" in said  # the test's tries, not the step's N
    proof = said[said.index("A test theorem"):].splitlines()
    hypotheses = [line.split(": ")[1] for line in proof[1:] if line[2:3].isdigit()]
    assert len(hypotheses) >= 5 and any(line.startswith("  ⊢ ") for line in proof)
    for line in proof:
        if "apply" in line:  # what is applied ends in the goal
            goal, formula = line.split("apply")[0].strip(), line.split(": ")[1]
            assert formula.endswith(goal)


def test_main_on_traces_prints_a_right_one(tiny, tmp_path, capsys, monkeypatch):
    task = TASKS["cot"](0)
    prompt, answer = task.test[0][0], task.test[1][0]

    def lucky(model, prompts, num_new_tokens, temperature=1.0, generator=None):
        return answer.expand(len(prompts), -1)

    assert main(["--task", "cot", "--N", "100", "--out", str(tmp_path)]) == 0  # more than are sampled at T = 1.3
    assert is_drawn(tmp_path / "cot.png") and "pass@512" not in capsys.readouterr().out
    monkeypatch.setattr(passn, "sample", lucky)
    assert main(["--task", "cot", "--loss", "ce", "--out", str(tmp_path)]) == 0
    assert "right trace: " + texts(task, torch.cat([prompt, answer])[None])[0] in capsys.readouterr().out


def test_runs_of_other_settings_are_neither_overwritten_nor_averaged(tiny, tmp_path, capsys):
    for changes in ([], ["--traces", "2"], ["--interval", "2", "--traces", "2"], ["--weight-decay", "0.5"]):
        assert main(["--task", "cot", "--loss", "limited", "--epochs", "1", *changes, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.json")} == {
        f"cot-limited-N64-{changes}-seed0.json" for changes in
        ("epochs=1", "epochs=1-traces=2", "epochs=1-traces=2-interval=2", "weight_decay=0.5-epochs=1")}
    table = capsys.readouterr().out.split("Figure")[-2]
    assert "limited N=64, epochs=1, traces=2, interval=2" in table and "±" not in table


def test_unfinished_runs_are_kept_apart(tiny, tmp_path, monkeypatch, capsys):
    """Ctrl-C keeps what was measured, but neither in place of a finished run nor as one."""
    new_epoch = passn.Answers.new_epoch

    def interrupt(kind, model, epoch, loss, N):
        if epoch == 1 and loss == "limited":
            raise KeyboardInterrupt
        new_epoch(kind, model, epoch, loss, N)

    monkeypatch.setattr(passn.Answers, "new_epoch", interrupt)
    assert main(["--out", str(tmp_path)]) == 130
    unfinished = json.loads((tmp_path / "multiply-limited-N64-seed0.json").read_text())
    assert [record["epoch"] for record in unfinished["history"]] == [0]
    said = capsys.readouterr()
    assert "Interrupted" in said.err and "limited-N64-seed0.json, which is unfinished: epoch 0" in said.err
    assert "cross-entropy" in said.out and "limited" not in said.out.replace("multiply-limited", "")
    monkeypatch.undo()
    monkeypatch.setitem(passn.SETTINGS, "multiply", TINY)
    assert main(["--loss", "limited", "--out", str(tmp_path)]) == 0
    finished = (tmp_path / "multiply-limited-N64-seed0.json").read_text()
    monkeypatch.setattr(passn.Answers, "new_epoch", interrupt)
    assert main(["--loss", "limited", "--out", str(tmp_path)]) == 130
    assert (tmp_path / "multiply-limited-N64-seed0.json").read_text() == finished
    assert (tmp_path / "multiply-limited-N64-seed0.partial").is_file()


def test_interrupted_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    def interrupted(seed):
        raise KeyboardInterrupt

    monkeypatch.setitem(TASKS, "multiply", interrupted)
    (tmp_path / "multiply-ce-N1-seed0.json").write_text("{}")
    assert main(["--out", str(tmp_path)]) == 130 and "Interrupted" in capsys.readouterr().err


def test_what_is_compared_has_the_same_settings(tiny, tmp_path, capsys):
    """Cross-entropy's row of another length is no rival for the ratios of the default one."""
    assert main(["--loss", "ce", "--epochs", "0", "--out", str(tmp_path)]) == 0
    assert main(["--out", str(tmp_path)]) == 0
    ends = [json.loads((tmp_path / f"multiply-{name}-seed0.json").read_text())["history"][-1]["test"]["pass@64"]
            for name in ("limited-N64", "ce-N1")]
    ratio = ends[0] / ends[1]
    assert f"{ratio:.2f} times cross-entropy's end" in capsys.readouterr().out


def fake_runs(loss, pass_64, hot=0.0):
    return [{"loss": loss, "history": [{"test": {"pass@64": value}, "tempered": {
        "1": {"pass@64": value}, "2": {"pass@64": hot}}} for value in pass_64]}]


def test_the_sentences_say_what_the_numbers_say():
    said = passn.in_words({"cross-entropy": fake_runs("ce", [0.1, 0.8, 0.4]),
                           "cross-entropy, weight decay": fake_runs("ce", [0.1, 0.1, 0.1], 0.9),
                           "limited N=64": fake_runs("limited", [0.1, 0.7, 0.6]),
                           "limited N=64, epochs=3": fake_runs("limited", [0.1, 0.7, 0.6])}, 64).splitlines()
    assert said == ["Cross-entropy's pass@64 is 0.800 in its best epoch and 0.400 at the end.",
                    "limited N=64 ends at 0.600: 1.50 times cross-entropy's end, 0.75 times its best epoch, 0.75 times "
                    "its best epoch and temperature, 0.67 times the best of all its rows."]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"loss": "ce", "N": 1, "config": {"epochs": 2}, "history": []}'])
def test_a_broken_file_among_the_runs_is_named_and_left_out(content, tiny, tmp_path, capsys):
    (tmp_path / "multiply-ce-N1-seed9.json").write_text(content)
    assert main(["--loss", "limited", "--epochs", "0", "--out", str(tmp_path)]) == 0
    assert "multiply-ce-N1-seed9.json" in capsys.readouterr().err


def test_in_a_notebook_figures_are_shown(monkeypatch, capsys, tmp_path):
    shown = []
    display = types.SimpleNamespace(Image=str, display=shown.append)
    for name, module in (("ipykernel", None), ("IPython", types.SimpleNamespace()), ("IPython.display", display)):
        monkeypatch.setitem(sys.modules, name, module)
    passn.present(plt.figure(), tmp_path / "figure.png")
    assert shown == [str(tmp_path / "figure.png")] and capsys.readouterr().out == f"Figure: {tmp_path / 'figure.png'}\n"


@pytest.mark.parametrize("where", ["save", "present"])
def test_a_full_disk_gets_one_clear_line(where, tiny, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(passn, where, full)
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path)])
    assert stop.value.code == 2 and "No space left on device): give a folder" in capsys.readouterr().err
    assert (where == "save") == (not [*tmp_path.glob("*.json")])


# ---- a pretrained model, here a tiny Llama with random weights and tokens that are characters ----------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a language model whose token 0 is a word, "!"; its end token is the last."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    characters = ["!", *sorted(set(map(chr, range(32, 127))) - {"!"}), "\n", "<end>"]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(characters, range(97))), unk_token="!"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                                      num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5)
    folder = tmp_path_factory.mktemp("llama")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 0.1  # attend to all of a text, so that a wrong mask or place shows
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def few(monkeypatch):
    """Settings for it: its upper two of three layers, trained until three problems are half known."""
    own = dict(model="llama", epochs=30, evaluations=1, batch_size=2, learning_rate=1e-2, n_layer=2)
    monkeypatch.setitem(passn.SETTINGS, "math-lm", passn.SETTINGS["math-lm"] | own)


def text_of(task, split, problem):
    """A problem's prompt and answer as lists of tokens."""
    prompts, answers = getattr(task, split)
    return [*prompts[problem]], answers[problem][answers[problem] != toy_tasks.NO_TOKEN].tolist()


def test_a_pretrained_model_reads_the_same_problems_in_its_own_tokens(llama, math_dir):
    task, small = TASKS["math"](0, math_dir, llama), TASKS["math"](0, math_dir)
    tokenizer = toy_tasks.language_model(llama)[1]
    told = {tokenizer.decode(prompt, clean_up_tokenization_spaces=False).replace(" ", ""): answer for prompt, answer in
            (text_of(task, split, i) for split in ("train", "test") for i in range(3))}
    assert told["Unheardof:2+3?\nAnswer:"] == tokenizer(" 5")["input_ids"] + [96]
    assert told["Whatis$-3-4$?\nAnswer:"] == tokenizer(" -7")["input_ids"] + [96] and len(told) == 6
    for policy in (lambda p, N: p, optimal_policy):
        assert passn.blind_pass_at_n(task, policy, 8) == pytest.approx(passn.blind_pass_at_n(small, policy, 8))


def test_a_pretrained_models_p_is_that_of_sampling_it(llama, math_dir, few):
    task = TASKS["math"](0, math_dir, llama)
    run, model = train(task, "limited", 4)
    kind = passn.Pretrained(task, passn.SETTINGS["math-lm"], 0, "cpu")
    p, confidence = (values.tolist() for values in kind.measure(model, "train", [1.0])[1.0][:2])
    torch.manual_seed(0)
    original, model = toy_tasks.language_model(llama)[0].float(), model.float()

    def next_logits(prompt, answers):  # the question read by the original, what follows by the trained model
        cache = original(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(answers))
        last = torch.full((len(answers), 1), prompt[-1])
        return model(torch.cat([last, answers], dim=1), past_key_values=cache).logits[:, -1]

    for problem in range(3):
        prompt, answer = text_of(task, "train", problem)
        sampled, best, log_best = torch.empty(4000, 0, dtype=torch.long), torch.empty(1, 0, dtype=torch.long), 0.0
        for _ in answer:
            sampled = torch.cat([sampled, next_logits(prompt, sampled).softmax(dim=1).multinomial(1)], dim=1)
        while best.shape[1] < 4 and 96 not in best:
            top = next_logits(prompt, best).log_softmax(dim=1).max(dim=1)
            best, log_best = torch.cat([best, top.indices[:, None]], dim=1), log_best + top.values.item()
        right = (sampled == torch.tensor(answer)).all(dim=1).double().mean().item()
        assert 0.1 < p[problem] < 0.95 and right == pytest.approx(p[problem], abs=0.04)
        assert math.log(confidence[problem]) == pytest.approx(log_best, abs=0.05)
    assert run["history"][-1]["train"]["pass@1"] == pytest.approx(sum(p) / 3)


def test_a_pretrained_models_batches_change_no_p(llama, math_dir, few):
    task = TASKS["math"](0, math_dir, llama)
    kind = passn.Pretrained(task, passn.SETTINGS["math-lm"], 0, "cpu")
    model = kind.new_model()
    together = kind.log_p(model, torch.tensor([2, 0, 1]))
    alone = torch.cat([kind.log_p(model, torch.tensor([i])) for i in (2, 0, 1)])
    torch.testing.assert_close(together, alone, rtol=2e-3, atol=2e-3)
    original = toy_tasks.language_model(llama)[0].float()
    for problem, log_p in zip((2, 0, 1), alone.tolist()):  # before training it is one pass over question and answer
        prompt, answer = text_of(task, "train", problem)
        logits = original(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
        assert log_p == pytest.approx(-F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item(), rel=5e-3)
    assert sorted(torch.cat(kind.batches(torch.Generator().manual_seed(0))).tolist()) == [0, 1, 2]


def test_only_the_upper_layers_of_a_pretrained_model_are_trained(llama, math_dir, few):
    task = TASKS["math"](0, math_dir, llama)
    before = {name: value.clone() for name, value in toy_tasks.language_model(llama)[0].state_dict().items()}
    (run, model), (again, _) = train(task, "ce", 4, epochs=2), train(task, "ce", 4, epochs=2)
    assert without_times(run) == without_times(again)  # the second begins with the same weights as the first
    after = toy_tasks.language_model(llama)[0].state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if re.match(r"model\.layers\.[12]\.", name)}


def test_main_fine_tunes_a_pretrained_model(tiny, few, llama, math_dir, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--task", "math", "--math-dir", str(math_dir), "--out", str(out), "--epochs", "1"]
    assert main([*arguments, "--model", llama]) == 0 and main(arguments) == 0
    assert is_drawn(out / "math-lm.png") and is_drawn(out / "math.png")
    assert len([*out.glob("math-lm-*.json")]) == 2 and len([*out.glob("math-*.json")]) == 4
    run = json.loads(next(out.glob("math-lm-ce*.json")).read_text())
    assert run["config"]["model"] == Path(llama).name and run["rivals"]
    tables = capsys.readouterr().out.split("Figure")
    assert "model=llama" in tables[0] and "model=llama" not in tables[1]  # the fixture calls another one the usual one


@pytest.mark.parametrize("name, hint", [
    ("/nowhere", "/nowhere"), ("/nowhere.gguf", "named nowhere.gguf"), (__file__, "config"), ("broken.gguf", "magic"),
    ("without a tokenizer", "tokenizer"), ("another kind", "'GPT2LMHeadModel' object has no attribute 'model'")])
def test_bad_models_get_one_line(name, hint, llama, math_dir, tmp_path, monkeypatch, capsys):
    import transformers
    monkeypatch.chdir(tmp_path)
    Path("broken.gguf").write_bytes(b"nonsense")
    toy_tasks.language_model(llama)[0].save_pretrained("without a tokenizer")
    toy_tasks.language_model(llama)[1].save_pretrained("another kind")
    config = transformers.GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained("another kind")
    capsys.readouterr()
    arguments = ["--task", "math", "--math-dir", math_dir, "--model", name, "--out", tmp_path / "out"]
    assert hint in refused(arguments, capsys)


def test_without_transformers_one_line_says_so(math_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if not installed
    arguments = ["--task", "math", "--math-dir", math_dir, "--model", "any", "--out", tmp_path / "out"]
    assert "pip install transformers" in refused(arguments, capsys)


# ---- bad input -------------------------------------------------------------------------------------------


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
    (["--weight-decay", "nan"], "from 0"), (["--weight-decay", "-1"], "from 0"), (["--traces", "8"], "--task multiply"),
    (["--task", "prove", "--interval", "1"], "--task prove"), (["--task", "cot", "--loss", "coverage"], "--loss ce"),
    (["--task", "cot", "--traces", "0"], "from 1"), (["--out", Path(__file__) / "x"], "folder"),
    (["--task", "math", "--math-dir", "/nowhere"], "train.jsonl"),
])
def test_bad_arguments_get_one_line(arguments, hint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hint in refused(arguments, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_device_that_is_not_there_gets_one_line(capsys):
    assert "--device auto" in refused(["--device", "cuda"], capsys)


@pytest.mark.parametrize("content, hint", [
    (b"", "no MATH problems"), (b"{oops\n", "line 1"), (b'{"problem": "x"}\n', "'solution'"), (b"[1]\n", "'problem'"),
    (b'{"problem": 1, "solution": "x"}\n', "'problem'"), (b"\xff\xfe\n", "UTF-8"),
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

ROOT = Path(passn.__file__).parent
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


def test_the_exercises_commands_are_python():
    """Each solution's Python can be read, and what it takes from passn.py is there."""
    blocks = re.findall(r"<<'END'\n(.*?)\nEND\n", TEXTS[ROOT / "exercises" / "README.md"], re.S)
    assert len(blocks) >= 11
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "passn":
                assert all(hasattr(passn, name.name) for name in node.names), block


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
    assert lines.count("\n") <= 15
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
