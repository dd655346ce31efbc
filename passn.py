"""pass@N, and a loss that trains for it.

Cross-entropy makes a model overconfident, overconfidence wastes tries, and one changed line in the loss stops it. This is
a small, complete reimplementation of Chen, Raventós, Cheng, Ganguli and Druckmann, "Rethinking Fine-Tuning when Scaling
Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning" (arXiv 2502.07154). Read it from top to bottom, or
run it:

    python passn.py                          # train with both losses and draw what happens
    python passn.py --loss limited --N 64    # one run
"""

import argparse
import contextlib
import glob
import inspect
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad, scaled_dot_product_attention
from tqdm import tqdm

from toy_tasks import END, PAD, TASKS, choose, require

# ==== 1. pass@N ===========================================================================================
#
# A model answers a problem by sampling. Let p be the probability that one try is right. Give the model N tries and
# count the problem as solved if any of them is right: it fails only if all N fail.


def pass_at_n(p, N):
    """pass@N = 1 - (1 - p)^N of each problem, exactly.

    p: success probabilities, a number or a tensor of any shape; N: a number, or one for each problem. Returns float64 on
    the CPU, nan where p is nan. Computed through log(1 - p), so that p = 1e-12 and N = 1,000,000 lose no digit. Raises
    ValueError where p is not within 0 and 1 (rounding errors of a millionth pass) or N < 1."""
    p, N = exact(p), number_of_tries(N)
    require(not ((p < -1e-6) | (p > 1 + 1e-6)).any(), "p is a probability, from 0 to 1")
    below_1 = torch.where((p < 0) | (p >= 1), 0.0, p)  # keeps the gradient finite where p = 1
    return torch.where(p >= 1, 1.0, -torch.expm1(N * torch.log1p(-below_1)))


def exact(x):
    """x as float64 on the CPU: float32 would lose the digits of N log(1 - p), and Apple's GPUs have no float64."""
    return x.cpu().double() if isinstance(x, torch.Tensor) else torch.as_tensor(x, dtype=torch.float64)


def number_of_tries(N):
    N = exact(N)
    require(((N >= 1) & (N <= 1e15)).all(), f"N is a number of tries, 1 or more; got {N.tolist()}")
    return N


def estimate_pass_at_n(num_samples, num_correct, N):
    """Unbiased estimate of pass@N from n samples of which c were right, for when p is unknown.

    1 - C(n - c, N) / C(n, N): of all ways to choose N of the n samples, the share with a right one among them. (Putting c / n for p into the formula above would be biased.)
    Each argument: a whole number, or a tensor of them; together they give the shape. Returns float64 on the CPU. Raises
    ValueError where N > n or N < 1, or where c is not within 0 and n. Source: Chen et al. 2021, arXiv 2107.03374."""
    n, c, N = checked_counts(num_samples, num_correct, N)
    return 1 - all_fail(n, c, N)


def checked_counts(num_samples, num_correct, N):
    n, c, N = exact(num_samples), exact(num_correct), exact(N)
    require((n % 1 + c % 1 + N % 1 == 0).all(), "n, c and N count samples: give whole numbers")
    require(((0 <= c) & (c <= n)).all(), "num_correct counts right samples: from 0 to num_samples")
    require(((1 <= N) & (N <= n)).all(), "pass@N cannot be estimated from fewer than N samples, nor for N < 1")
    return n, c, N


def all_fail(n, c, N):
    """C(n - c, N) / C(n, N) = Π_{j<c} (1 - N / (n - j)): of all sets of N samples, the share without a right one."""
    result = torch.ones(torch.broadcast_shapes(n.shape, c.shape, N.shape), dtype=torch.float64)
    for j in range(int(max(c.flatten().tolist(), default=0))):
        result *= torch.where(j < c, (1 - N / (n - j)).clamp(min=0), 1.0)
    return result


# ==== 2. The losses =======================================================================================
#
# Cross-entropy, -log p, asks that the first try be right. With N tries, ask that any of them be right: minus the logarithm
# of pass@N. That is the whole idea. What it changes shows in the gradient:
#
#     d/dθ [-log(1 - (1 - p)^N)] = F(N, p) · d/dθ [-log p],      F(N, p) = N p (1 - p)^(N-1) / (1 - (1 - p)^N)
#
# This is the chain rule, with dp = p · d log p. Where p is small, (1 - p)^N is e^(-N p), and F depends on u = N p alone, the
# number of right answers to expect among N: F ≈ u / (e^u - 1). While p is far below 1/N, F is 1, and the example pulls as it
# does under cross-entropy. Around 1/N the pull fades: F is 0.58 at p = 1/N, 0.16 at 3/N, 0.03 at 5/N. So an example that N
# tries solve gets almost no gradient, and the model grows little surer of it: the loss limits confidence. With N = 1, F is 1
# for every p: that is cross-entropy.


def dco_loss(log_p, N):
    """The limited loss (Direct Coverage Optimization): L_N = -log(1 - (1 - p)^N) of each example, in nats.

    log_p: (B,) log-probabilities of the right answers, each the sum over the answer's tokens; N: a number, or (B,) one for
    each example. Returns (B,), in the dtype of log_p: take the mean and call backward. Autograd supplies F. The relative
    error is below 1e-5 in float32 and 1e-12 in float64, and the gradient finite, for N from 1 to 1,000,000 and log_p from 0
    to -2000, where p itself has long underflowed. Raises ValueError for N < 1, for log_p > 0, which is no log-probability
    (a loss, perhaps: change its sign), and for integers. These checks read values: torch.compile breaks its graph there, and
    torch.func.vmap fails; it is not needed. Source: arXiv 2502.07154."""
    x, N, log_fail = log_probabilities(log_p, N)
    loss = -log1mexp(N * log_fail) + (x.clamp(min=-50) - x)  # where p < e^-50, 1 - (1 - p)^N is N p to the last digit
    return torch.where(N == 1, -x, loss).to(log_p)


def overconfidence_factor(log_p, N):
    """F(N, p) = N p (1 - p)^(N-1) / (1 - (1 - p)^N) of each example, from 1 down to 0: the share of cross-entropy's gradient
    that the limited loss keeps, F = -d L_N / d log p. It is small where the model is surer than N tries need.

    Arguments, precision and errors as in `dco_loss`. To weight cross-entropy by F yourself, detach F."""
    x, N, log_fail = log_probabilities(log_p, N)
    log_factor = torch.log(N) + x.clamp(-50, 0) + (N - 1) * log_fail - log1mexp(N * log_fail)
    return torch.where(N == 1, 1.0, log_factor.exp()).to(log_p)


def log_probabilities(log_p, N):
    """log p, N and log(1 - p), in float64. For the last, log p is kept within -50 and just below 0, so that it is finite."""
    require(log_p.is_floating_point(), "log_p is a tensor of floating-point numbers")
    require(not (log_p > 1e-3).any(), "log_p is a log-probability, 0 or less: is its sign lost?")
    x = exact(log_p)
    return x, number_of_tries(N), log1mexp(x.clamp(-50, -1e-300))


def log1mexp(x):
    """log(1 - e^x) for x < 0, by whichever of two forms does not cancel (Mächler 2012)."""
    near_zero = x > -math.log(2)
    by_expm1 = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    by_log1p = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, by_expm1, by_log1p)


# Reinforcement learning with a verifier climbs something else: not the mean of log pass@N, but the mean of pass@N itself.
# With N = 1 that is the mean of p, the usual reward. Each loss is a weight on d log p, and there are two dials:
#
#                            N = 1                     N = 64
#     mean of log pass@N     1: cross-entropy          F(N, p): the limited loss
#     mean of pass@N         p: the usual reward       N p (1 - p)^(N-1), which is pass@N times F
#
# The row decides about hard examples. Under the log they pull with full weight, however small their p. Under the mean they
# pull in proportion to pass@N: next to nothing, the more so with N = 1. That wins where answers can only be guessed, and
# neglects what could still be learned. The column decides about easy examples. With N = 64 they let go, with N = 1 they
# never do.


def reward_loss(log_p, N):
    """Minus the mean pass@N of a batch, a scalar. Reinforcement learning for pass@N climbs this mean, by estimates; here its
    gradient is exact.

    log_p: (B,); N as in `dco_loss`. Computed in float64. Raises ValueError as `dco_loss` does, and for an empty batch,
    which has no mean."""
    require(len(log_p) > 0, "an empty batch has no mean pass@N")
    x, N, _ = log_probabilities(log_p, N)
    return -torch.exp(-dco_loss(x, N)).mean().to(log_p)


def pass_at_n_weights(num_samples, num_correct, N):
    """The weight of each right try in an unbiased estimate of the gradient of pass@N, from n tries of which c are right:

        ∇ pass@N ≈ Σ_right w ∇ log π(try),      w = N/n · C(n - c, N - 1) / C(n - 1, N - 1).

    w is N/n times the unbiased estimate of (1 - p)^(N-1), the chance that N - 1 other tries all fail: the idea of F once
    more. A wrong try weighs 0, and no baseline need be subtracted. With N = 1, w = 1/n: plain REINFORCE.
    Arguments, shapes and errors as in `estimate_pass_at_n`. Source: Walder and Karkhanis 2025, arXiv 2505.15201."""
    n, c, N = checked_counts(num_samples, num_correct, N)
    return (c > 0) * N / n * all_fail(n - 1, c - 1, N - 1)


def reinforce_loss(is_right, log_pi, N):
    """A loss whose gradient is minus this estimate, from tries: which are right, and their log-probabilities, both (B, n)."""
    weights = pass_at_n_weights(is_right.shape[1], is_right.sum(dim=1), N)
    return -(weights[:, None] * is_right * log_pi).sum(dim=1).mean()


LOSSES = {  # from the batch's log_p (B,) and N to the number that is minimized
    "ce": lambda log_p, N: -log_p.mean(),
    "limited": lambda log_p, N: dco_loss(log_p, N).mean(),
    "reward": reward_loss,
}

# ==== 3. A small GPT ======================================================================================
#
# The usual decoder: token and position embeddings, blocks of attention and MLP, logits for the next token. What tasks need
# of it are two methods: the probability of a given answer, and sampled answers. Two things save time and change no number.
# `last`: where only the last few logits are wanted (the answer's), the last block computes only those; 0 means all. `past`:
# keys and values of past positions are kept, while sampling, and for texts that begin alike.


class Block(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1 = nn.LayerNorm(n_embd)
        self.query = nn.Linear(n_embd, n_embd)
        self.key_value = nn.Linear(n_embd, 2 * n_embd)
        self.projection = nn.Linear(n_embd, n_embd)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, x, last, past=None, start=0):
        """x (B, T, C) -> its last positions (B, last, C), and the keys and values (B, heads, ·, C / heads) so far. In `past`
        are those of the positions before `start`, where x begins, and room for more."""
        def heads(t):  # (B, ·, C) -> (B, heads, ·, C / heads)
            return t.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

        normed, end = self.ln_1(x), start + x.shape[1]
        q = heads(self.query(normed[:, -last:]))
        k, v = map(heads, self.key_value(normed).chunk(2, dim=-1))
        if past:
            keys, values = past
            keys[:, :, start:end], values[:, :, start:end] = k, v
            k, v = keys[:, :, :end], values[:, :, :end]
        Q, K = q.shape[2], k.shape[2]
        mask = None
        if 1 < Q < K:
            mask = torch.ones(Q, K, dtype=torch.bool, device=x.device).tril(K - Q)
        attended = scaled_dot_product_attention(q, k, v, mask, is_causal=Q == K)  # to itself and what is before it
        x = x[:, -last:] + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x)), past or (k, v)


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_layer=2, n_head=4, n_embd=64):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, n_embd)
        self.position_embedding = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.03)  # a little more than GPT-2's, for a smaller model
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens):
        """tokens (B, T) int64 -> logits (B, T, vocab_size)."""
        return self.run(tokens)[0]

    def run(self, tokens, last=0, past=None, start=0):
        """The logits at the last positions of tokens (0: all), and the keys and values of every block. Tokens that follow
        others begin at position `start`, and find those of the others in `past`, which has room for theirs."""
        x = self.token_embedding(tokens) + self.position_embedding.weight[start:start + tokens.shape[1]]
        present = []
        for i, block in enumerate(self.blocks):
            x, keys_values = block(x, last if block is self.blocks[-1] else 0, past and past[i], start)
            present.append(keys_values)
        return self.head(self.ln(x)), present

    def share(self, past, which, room):
        """The keys and values of some texts, by number: each as often as it is named, with room for more positions."""
        return [[pad(part.index_select(0, which), (0, 0, 0, room)) for part in keys_values] for keys_values in past]

    def log_p(self, prompts, answers, temperature=1.0):
        """log p(y|x) = Σ_t log p(y_t | x, y_<t) of answers (B, A) to prompts (B, T): (B,), from one forward pass; where
        several temperatures are given, (temperatures, B). Padding after an answer does not count."""
        texts = torch.cat([prompts, answers[:, :-1]], dim=1)
        logits = torch.cat([self.run(some, answers.shape[1])[0] for some in texts.split(250)])
        log_ps = []
        for T in torch.as_tensor(temperature).flatten().tolist():
            losses = cross_entropy(logits.mT / T, answers, ignore_index=PAD, reduction="none")
            log_ps.append(-losses.sum(dim=1))
        return log_ps[0] if isinstance(temperature, (int, float)) else torch.stack(log_ps)

    @torch.no_grad()
    def sample(self, prompts, length, temperature=1.0):
        """Answers (B, length) to prompts (B, T), each next token from softmax(logits / temperature), the likeliest one at
        temperature 0. After END comes padding only."""
        if len(prompts) > 1024 and prompts.device.type == "cpu":  # a large cache is slower there
            return torch.cat([self.sample(some, length, temperature) for some in prompts.split(1024)])
        tokens, place = prompts.unique(dim=0, return_inverse=True)  # equal prompts are read once
        logits, past = self.run(tokens, 1)
        logits, past, answers = logits[place], self.share(past, place, length), []
        for i in range(length):
            if answers:
                logits, past = self.run(answers[-1], 1, past, prompts.shape[1] + i - 1)
            answers.append(choose((logits / max(temperature, 1e-6)).softmax(dim=-1)))
        answers = torch.cat(answers, dim=1)
        is_end = answers == END
        return answers.masked_fill(is_end.cumsum(dim=1) > is_end, PAD)

# ==== 4. Training =========================================================================================
#
# One loop for every loss and task. A task, in toy_tasks.py, gives it log p of training examples, differentiable; p of all
# test problems, from which pass@N follows for every N; and tries, to look at. The gradient is that of what the task shows,
# be it an answer, a trace or a step of a proof, and F depends on p of a whole try.
#
# F gets small, but never zero, and Adam divides a gradient by its own recent size: when all gradients are small, it makes
# full-size steps of them, and p drifts on. Two things hold it back. Adam's `eps`, far above the usual 1e-8, leaves small
# gradients small. And training passes over an example that N tries already solve (F < 0.1: p beyond about 3.6/N), as the
# paper's own code does: gradients add up, and an update is made for as many pulling examples as fill a batch. On products,
# training p ends near 5/N for N = 64, since updates for other examples carry it a little further.

SETTINGS = {  # of all tasks: {name: (default, what it is)}. Each is a flag, as in --learning-rate 3e-3
    "loss": (["ce", "limited"], "one or more of the losses"),
    "N": ([64], "tries that a loss trains for, one number or more; cross-entropy's is 1"),
    "seed": (0, "of the problems, the first weights and all chance"),
    "epochs": (100, "times that training goes through its examples"),
    "evaluations": (10, "how often to measure, roughly, at equal distances"),
    "batch_size": (50, "examples that pull in one update"),
    "learning_rate": (3e-3, "at its peak"),
    "weight_decay": (0.0, "AdamW's"),
    "eps": (1e-3, "Adam's"),
    "pass_over": (0.1, "the limited loss passes over examples with F(N, p) below this; 0: over none"),
    "n_layer": (2, "blocks of the model"),
    "n_head": (4, "attention heads"),
    "n_embd": (64, "width of the model"),
}


def train(task, loss="limited", N=64, seed=0, out=None, device="cpu",
          tries=64, place=0, **changes):
    """Train a new model on a task, given by its name, and measure it as it learns. Returns the run, a dictionary (see the
    README), and the model. `changes` are to the task's settings: epochs=10. In the folder `out`, if given, the run is saved.

    `tries` is the N of the guessers among the baselines, `place` the line of the progress bar. Raises ValueError where a
    setting does not fit, and FloatingPointError where training diverges."""
    config = configure(task, loss, N, seed, **changes)
    for name, value in changes.items():
        require(config[name] == value, f"{name} does nothing for the loss {loss}; leave it out")
    c = SimpleNamespace(**config)
    torch.manual_seed(seed)
    problems = TASKS[task](seed, **{name: config[name] for name in TASKS[task].about}).to(device)
    model = problems.new_model(GPT, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), eps=c.eps,
                                  weight_decay=c.weight_decay, fused=device != "mps")
    run = new_run(task, config, problems, tries)
    order = torch.Generator().manual_seed(seed)  # the same for every loss
    is_solved = torch.zeros(problems.size, dtype=torch.bool)  # by N tries, when last seen
    num_pulled, updates, start = 0, 0, time.perf_counter()

    def pulling(log_p, examples):  # log p of those that are not solved; the others are passed over
        if c.loss == "limited":
            is_solved[examples] = overconfidence_factor(log_p.detach(), c.N).cpu() < c.pass_over
        return log_p[~is_solved[examples]]

    for epoch in tqdm(range(c.epochs + 1), f"{run['label']}, seed {seed}", leave=False, position=place):
        is_last = epoch == c.epochs
        is_measured = is_last or epoch % math.ceil(c.epochs / c.evaluations) == 0
        if is_measured or c.loss != "ce":
            problems.refresh(model, epoch)
        if is_measured:
            record = {"epoch": epoch, "updates": updates, "seconds": time.perf_counter() - start}
            run["history"].append(record | evaluate(problems, model, c.loss, c.N))
            run["tries"] = problems.show_tries(model, 64)
            save(run, out, is_last)
        if is_last:
            return run, model
        if is_solved.any():
            again = is_solved.nonzero()[:, 0]  # are they still? That takes no gradient
            pulling(look(problems, model, again), again)
        examples = torch.randperm(problems.size, generator=order)
        examples = examples[~is_solved[examples]]
        for first in range(0, len(examples), c.batch_size):
            batch = examples[first:first + c.batch_size]
            if problems.reinforce:
                objective, number = reinforce_loss(*problems.sample_tries(model, batch), c.N), len(batch)
            else:
                log_p = pulling(problems.log_p(model, batch), batch)
                objective, number = LOSSES[c.loss](log_p, c.N), len(log_p)
            if number > 0:
                (objective * number / c.batch_size).backward()  # adds to the gradients
            num_pulled += number
            if num_pulled >= c.batch_size:
                progress = (epoch + first / len(examples)) / c.epochs
                optimizer.param_groups[0]["lr"] = c.learning_rate * schedule(progress)
                optimizer.step()
                optimizer.zero_grad()
                num_pulled, updates = num_pulled - c.batch_size, updates + 1  # the surplus counts for the next


def schedule(progress):
    """The learning rate's share of its peak: up over the first 5 % of training, then a cosine down to a tenth."""
    warm_up = min(1, 0.01 + progress / 0.05)
    return warm_up * (0.55 + 0.45 * math.cos(math.pi * progress))


@torch.no_grad()
def look(problems, model, examples):
    """log p of training examples, as it is now."""
    return torch.cat([problems.log_p(model, some) for some in examples.split(250)])


@torch.no_grad()
def evaluate(problems, model, loss, N):
    """The loss and the mean p of training examples; of the test problems the mean confidence, and p of each."""
    log_p = look(problems, model, torch.arange(0, problems.size, problems.size // problems.num_measured + 1))
    p, confidence = problems.measure(model)
    if any(values.isnan().any() for values in (log_p, p, confidence)):
        raise FloatingPointError("diverged: try a smaller --learning-rate or --weight-decay")
    rounded = [[float(f"{value:.6g}") for value in values] for values in p.tolist()]
    return {"loss": LOSSES[loss](log_p, N).item(), "train_p": log_p.exp().mean().item(),
            "confidence": confidence.mean().item(), "p": rounded}

# ==== 5. Theory ===========================================================================================
#
# Why does each loss do what it does? Where a question has one answer that can be learned, cross-entropy learns it by heart,
# to p = 1, and the limited loss's pull fades around 1/N. Where the answer stays uncertain, the losses' optima differ. To see
# that, take the network away. Let there be many questions that the model cannot tell apart: answer i is right in a share
# p_i of them. (In this section, then, p belongs to the questions, and q is what the model gives each answer.) A policy q
# reaches pass@N = Σ_i p_i (1 - (1 - q_i)^N). Which q is best, and where does each loss lead? Cross-entropy is least where
# q = p, whatever N is. In general, a little more of q goes to the answer where it gains most. At the optimum all answers
# that are kept gain the same, λ, and one that gets nothing would gain less: the Lagrangian's derivative is zero.


def optimal_policy(p, N):
    """The policy q that maximizes pass@N over Σ_i q_i = 1. The reward loss, minus pass@N, tends to it.

    The gain is N p_i (1 - q_i)^(N-1), so q_i = max(0, 1 - (λ / N p_i)^(1/(N-1))): water-filling. The larger N, the flatter.
    With N = 1 all of q is on the likeliest answer; if several are, they share it equally.
    p: (K,) numbers from 0 on, not all 0 (their scale does not matter). Returns (K,), float64 numpy, sum 1. Raises ValueError
    for any other p, and for N < 1."""
    return with_equal_gains(lambda q, N: max(N - 1, 1e-9) * np.log1p(-q), p, N)  # for N = 1 it falls, but hardly


def limited_policy(p, N):
    """The policy q that minimizes the limited loss, Σ_i p_i L_N(q_i) over Σ_i q_i = 1: where that loss tends.

    The gain is p_i F(N, q_i) / q_i. Where q_i ≪ 1/N, F is 1 and q_i = p_i / λ, in proportion, as cross-entropy has it (for
    N = 1 everywhere: q = p). Beyond 1/N, q_i is held back. The logarithm gives no possible answer up.
    Arguments, result and errors as in `optimal_policy`."""
    def log_gain(q, N):
        return (N - 1) * np.log1p(-q) - np.log(pass_at_n(q, N).numpy())

    return with_equal_gains(log_gain, p, N)


def with_equal_gains(log_gain, p, N):
    """The q with sum 1 for which log p + log_gain(q) is the same, log λ, wherever q > 0. Since the gain falls with q, a table
    of it gives q for any λ (to eight digits), and bisection finds log λ."""
    p, N = np.asarray(p, dtype=np.float64), number_of_tries(N).item()
    require(p.ndim == 1 and p.min() >= 0 and 0 < p.sum() < math.inf, "p is a row of numbers from 0 on, not all 0")
    q = 1 / (1 + np.exp(-np.linspace(-60, 36, 200_000)))
    table = log_gain(q, N)
    with np.errstate(divide="ignore"):
        log_p = np.log(p / p.max())
    low, high = table[-1], 60.0
    for _ in range(100):
        middle = (low + high) / 2
        policy = np.interp(middle - log_p, table[::-1], q[::-1], right=0)
        low, high = (low, middle) if policy.sum() < 1 else (middle, high)
    return policy / policy.sum()


def guessers(problems, N):
    """{name: p of the test problems} of guessers who never see the question. They know how often each answer is right in
    training, and sample from a policy."""
    p = [*problems.frequencies.values()]
    policies = {"guess by frequency": p, f"guess at the limited loss's optimum, N={N}": limited_policy(p, N),
                f"guess best for {N} tries": optimal_policy(p, N)}
    by_answer = {name: dict(zip(problems.frequencies, q)) for name, q in policies.items()}
    return {name: [q.get(answer, 0.0) for answer in problems.test_answers] for name, q in by_answer.items()}


def confident_pass_at_n(c, N, a, K):
    """The one-parameter picture. A model puts probability c, its confidence, on its favourite answer, which is right with
    probability a, and spreads the rest evenly over the K - 1 others:
        pass@N(c) = a (1 - (1 - c)^N) + (1 - a) (1 - (1 - (1 - c) / (K - 1))^N).
    At c = 1 that is a for every N: no amount of sampling helps. c: a number or an array."""
    return a * pass_at_n(c, N) + (1 - a) * pass_at_n((1 - c) / (K - 1), N)

# ==== 6. Runs, table and figures ==========================================================================
#
# A run holds p of every test problem, and so pass@N for every N. The table and the figure are made from saved runs alone.
# Nothing from here on is needed to understand the rest.

COLUMNS = (1, 8, 64, 512)  # numbers of tries that figures mark, and that --frontier trains for
COLORS = {"ce": "#D55E00", "limited": "#0072B2", "reward": "#009E73"}  # for the colour-blind (Okabe, Ito)


def new_run(task, config, problems, tries):
    """A run that has measured nothing yet. Its label names the settings that are not as usual. Paths are no part of it:
    `data` tells one data set from another."""
    usual, loss, N = settings_of(task), config["loss"], config["N"]
    own = {name: value for name, value in config.items() if name not in ("N", "seed") and not isinstance(value, str)}
    changed = [f"{name}={value}" for name, value in own.items() if value != usual[name][0]]
    label = ", ".join(["cross-entropy" if loss == "ce" else f"{loss} N={N}", *changed])
    baselines = problems.baselines | (guessers(problems, tries) if problems.frequencies else {})
    return {"task": task, "loss": loss, "N": N, "seed": config["seed"], "label": label,
            "config": own | {"data": problems.data}, "num_samples": problems.num_samples,
            "temperatures": problems.temperatures, "history": [], "baselines": baselines}


def save(run, out, is_finished):
    """Write a run, whole or not at all: to a new file, which then takes the old one's place. Until it is finished, that is
    *.partial, of a name that no other process writes. Refused where there is a run of other data, or of other
    settings, saved before an edit of this file."""
    if out is None:
        return
    name = f"{run['task']}-{run['label']}-seed{run['seed']}".replace(", ", "-").replace(" ", "-")
    path, partial, new = (Path(out, name + end) for end in (".json", f"-{os.getpid()}.partial", f"-{os.getpid()}.new"))
    path.parent.mkdir(parents=True, exist_ok=True)
    text, config = (json.dumps(part, separators=(",", ":")) for part in (run, run["config"]))
    require(not path.exists() or config in path.read_text(encoding="utf-8"),
            f"{path} has other settings or data: remove it, or give another folder")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path if is_finished else partial)
    finally:
        new.unlink(missing_ok=True)  # what a full disk has left
    for old in path.parent.glob(f"{glob.escape(name)}-*.partial") if is_finished else ():
        old.unlink(missing_ok=True)


def is_of(job, run):
    """Whether a run has the settings of a job, whatever its seed."""
    settings = {"loss": run["loss"], "N": run["N"]} | run["config"]
    return all(job[name] == value for name, value in settings.items() if name != "data")


def pass_at(run, N):
    """pass@N in the test: (epochs, temperatures), the first temperature 1. Where p is a share of samples, it is estimated,
    and nan if they are too few."""
    p, n = torch.tensor([record["p"] for record in run["history"]], dtype=torch.float64), run["num_samples"]
    if n is None:
        each = pass_at_n(p, N)
    else:
        each = estimate_pass_at_n(n, (n * p).round(), N) if N <= n else math.nan * p
    return each.mean(dim=2).numpy()


def load_runs(out, task):
    """A task's finished runs in a folder: rows, each a list of runs that differ in the seed only, cross-entropy first. A file
    with anything wrong is named and left out."""
    rows = {}
    for path in sorted(Path(out).glob(f"{task}-*.json")):
        try:
            run = json.loads(path.read_text(encoding="utf-8"), parse_constant=int)  # which refuses NaN
            if run["task"] == task:
                with contextlib.redirect_stdout(io.StringIO()):  # can it be shown?
                    print_table([[run]], 1)
                    print_tries([[run]])
                rows.setdefault(row_of(run), []).append(run)
        except Exception as error:  # whatever it is, the other runs must not suffer
            print(f"left out {path}, which is no run of this version ({error!r}); remove it", file=sys.stderr)
    return [rows[key] for key in sorted(rows)]


def row_of(run):
    """What runs of one row have in common."""
    shape = np.shape(run["history"][0]["p"])  # (temperatures, problems)
    require(all(len(p) == shape[1] for p in run["baselines"].values()), "a baseline is of other problems")
    require(isinstance(run["loss"], str) and isinstance(run["seed"], int), "it has no loss or no seed")
    epochs = [record["epoch"] for record in run["history"]]
    alike = json.dumps([run["config"], [*run["baselines"]], epochs, shape])
    return run["loss"] != "ce", run["loss"], int(run["N"]), run["label"], alike


def stack(row, N):
    """pass@N of a row's runs: (seeds, epochs, temperatures)."""
    return np.array([pass_at(run, N) for run in row])


def over_seeds(values):
    """Mean and standard error over the first axis, the seeds; an error of 0 where there is only one."""
    deviation = np.std(values, axis=0, ddof=len(values) > 1)
    return np.mean(values, axis=0), deviation / math.sqrt(len(values))


def baselines_of(rows):
    """{name: p (seeds, problems)}, of the row with the most seeds."""
    most = max(rows, key=len)
    return {name: torch.tensor([run["baselines"][name] for run in most]) for name in most[0]["baselines"]}


def print_table(rows, N):
    """A line for each loss and its settings, at the end of training, and for the baselines: mean over the seeds ± standard
    error. In the last two columns stands pass@N in the best epoch, and at the best temperature too. These are chosen on the
    test set itself, which flatters them."""
    Ns, lines = sorted({1, 8, N}), []
    for row in rows:
        columns = [stack(row, n)[:, -1, 0] for n in Ns]
        columns.append([run["history"][-1]["confidence"] for run in row])
        best = stack(row, N)
        columns += [best[:, :, 0].max(axis=1), best.max(axis=(1, 2))]
        lines.append((row[0]["label"], columns))
    for name, p in baselines_of(rows).items():
        lines.append((name, [pass_at_n(p, n).mean(dim=1).numpy() for n in Ns]))
    width = max(len(name) for name, _ in lines)
    headers = [f"pass@{n}" for n in Ns] + ["confidence", f"best@{N}", "& best T"]
    print(" " * width, "seeds", *(header.rjust(10) for header in headers))
    for name, columns in lines:
        cells = []
        for mean, error in map(over_seeds, columns):
            cell = f"{mean:.3f}" + f"±{error:.3f}" * (len(columns[0]) > 1)
            cells.append(cell.replace("0.", ".").rjust(10))
        print(name.ljust(width), f"{len(columns[0]):5}", *cells)


def print_tries(rows):
    """What 64 tries at the first three test problems gave under each loss: overconfidence to the naked eye."""
    print("64 tries at the first three test problems, and how often the commonest came:")
    runs = [run for row in rows for run in row if run["seed"] == rows[0][0]["seed"]]
    for same_problem in zip(*(run["tries"] for run in runs)):
        print(same_problem[0][0])
        for run, (_, num_right, tries) in zip(runs, same_problem):
            counts = Counter(tries)
            commonest = ", ".join(f"{text} ({count})" for text, count in counts.most_common(4))
            print(f"  {run['label']}: {num_right} right, {len(counts)} different; {commonest}")


def color_of(loss, N):
    """A colour belongs to a loss; it is paler for fewer tries."""
    return COLORS.get(loss, "#CC79A7"), 1.0 if loss == "ce" else min(1.0, 0.4 + math.log2(N) / 15)


def draw(rows, N, path):
    """Two figures: what each loss does to pass@N as training goes on; and to pass@1, to confidence, and to pass@n at the end."""
    import matplotlib.pyplot as plt  # here, since it takes a while
    first, pass_N = plt.subplots(figsize=(8, 5.2), layout="constrained")
    more, (pass_1, confidence, tries) = plt.subplots(1, 3, figsize=(15, 5.2), layout="constrained")
    axes, ns, drawn = (pass_1, pass_N, confidence, tries), 2 ** np.arange(10), Counter()
    for row in rows:
        color = color_of(row[0]["loss"], row[0]["N"])
        style = ("-", "--", "-.", ":")[drawn[color] % 4]  # of other settings
        drawn[color] += 1
        epochs = [record["epoch"] for record in row[0]["history"]]
        sure = np.array([[record["confidence"] for record in run["history"]] for run in row], dtype=float)
        sure[:, 0] = math.nan  # an untrained model's greedy answer is often none
        at_end = np.transpose([stack(row, n)[:, -1, 0] for n in ns])
        curves = stack(row, 1)[:, :, 0], stack(row, N)[:, :, 0], sure, at_end
        for axis, values in zip(axes, curves):
            mean, error = over_seeds(values)
            xs = ns if axis is tries else epochs
            axis.plot(xs, mean, style, color=color, label=row[0]["label"])
            axis.fill_between(xs, mean - error, mean + error, color=color[0], alpha=0.2, linewidth=0)
    label, best = rows[0][0]["label"], stack(rows[0], N)
    pass_N.axhline(best[:, :, 0].max(axis=1).mean(), color="grey", linestyle="--", label=f"{label}: best epoch")
    pass_N.axhline(best.max(axis=(1, 2)).mean(), color="grey", linestyle=":", label=f"{label}: best epoch and temperature")
    confidence.axhline(1 / N, color="grey", label=f"1/N = 1/{N}")
    confidence.legend(handles=confidence.lines[-1:])
    for (name, p), style in zip(baselines_of(rows).items(), (":", "--", "-.")):
        tries.plot(ns, [pass_at_n(p, n).mean() for n in ns], style, color="grey", label=name)
    titles = "pass@1", f"pass@{N} on test problems", "confidence: p of the greedy answer", "pass@n at the end"
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="epoch", ylim=(0, None if axis is pass_1 else 1))
    tries.set(xlabel="tries n", xscale="log")
    tries.set_xticks(COLUMNS, COLUMNS)
    tries.minorticks_off()
    for figure, axis, end in ((first, pass_N, ""), (more, tries, "-more")):
        figure.legend(handles=[*axis.lines], loc="outside lower center", ncols=2)
        figure.savefig(figure_path := Path(path).with_stem(Path(path).stem + end), dpi=110)
        print(f"Figure: {figure_path}")


def draw_frontier(panels, path):
    """Which N should one train with, if the test gives n tries? A panel for each {title: rows}: pass@n at the end of training,
    divided by the best that any of the rows has at n."""
    import matplotlib.pyplot as plt
    size = 1 + 4.7 * len(panels), 4.6
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    tries = 2 ** np.arange(10)
    for axis, (title, rows) in zip(axes.flat, panels.items()):
        at_end = [[stack(row, n)[:, -1, 0].mean() for n in tries] for row in rows]
        for row, shares in zip(rows, at_end / np.max(at_end, axis=0)):
            N = row[0]["N"]
            color = plt.cm.viridis(math.log2(N) / 10)
            line, = axis.plot(tries, shares, color=color, label=f"trained for N = {N}")
            axis.plot(N, np.interp(N, tries, shares), "o", color=color, clip_on=False)
        axis.set(title=title, xlabel="tries n", ylabel="pass@n / the best at n", xscale="log", ylim=(0, 1.03))
        axis.set_xticks(COLUMNS, COLUMNS)
        axis.minorticks_off()
    figure.legend(handles=line.axes.lines[::2], loc="outside lower center", ncols=2 * len(panels))
    figure.savefig(path, dpi=110)
    print(f"Figure: {path}")


def draw_theory(N, path):
    """The theory in three panels, in the order of the argument."""
    import matplotlib.pyplot as plt
    figure, (weight, policies, confidence) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    log_p = torch.linspace(-9, 0, 500, dtype=torch.float64, requires_grad=True)
    for loss, n in (("ce", 1), ("limited", N), ("reward", 1), ("reward", N)):
        gradient, = torch.autograd.grad(LOSSES[loss](log_p, n) * len(log_p), log_p)
        style = "-" if n == N or loss == "ce" else "--"
        weight.plot(log_p.exp().tolist(), -gradient, style, color=COLORS[loss], label=f"{loss}, N = {n}")
    weight.axvline(1 / N, color="grey", linestyle=":", label=f"1/N = 1/{N}")
    a, K = 0.1, 500
    c = np.geomspace(1 / K, 1, 1000)
    for n in COLUMNS:
        pass_at_c, grey = confident_pass_at_n(c, n, a, K), f"{0.75 - math.log2(n) / 12}"
        confidence.plot(c, pass_at_c, color=grey, label=f"N = {n}")
        confidence.plot(c[pass_at_c.argmax()], pass_at_c.max(), "o", color=grey)
    rank = np.arange(1, 101)  # one uncertain question: 100 answers, the r-th likeliest with p ~ r^-1.2
    p = rank**-1.2 / (rank**-1.2).sum()
    tends = {"ce": ("-", p, "cross-entropy: q = p"), "limited": ("--", limited_policy(p, N), "limited loss"),
             "reward": ("-.", optimal_policy(p, N), "reward loss, best for pass@N")}
    for loss, (style, q, name) in tends.items():
        policies.plot(rank[q > 0], q[q > 0], style, color=COLORS[loss], label=name)
    policies.axhline(1 / N, color="grey", linestyle=":", label=f"1/N = 1/{N}")
    weight.set(title="(a) Each loss is a weight on ∇ log p", ylabel="weight of an example",
               xlabel="hard examples          p of a right try          easy examples")
    policies.set(title=f"(b) Where each loss tends, N = {N}, if the question\nleaves open which of 100 answers is right", yscale="log",
                 xlabel="answer, by rank r: it is right with p ~ 1 / r^1.2", ylabel="probability q given to the answer")
    confidence.set(title=f"(c) The best confidence (dot) falls as N grows,\nif the favourite of {K} answers is right with p = {a}",
                   xlabel="confidence c: probability given to the favourite", ylabel="pass@N")
    for axis in (weight, policies, confidence):
        axis.set(xscale="log")
        axis.legend()
    figure.savefig(path, dpi=110)
    print(f"Figure: {path}")


# ==== 7. Settings and command line ========================================================================


def settings_of(task):
    """{name: (default, what it is)}: the settings of all tasks, and the task's own, which are over them."""
    require(task in TASKS, f"{task} is no task: choose from {', '.join(TASKS)}")
    arguments = inspect.signature(TASKS[task]).parameters
    settings = SETTINGS | {name: (arguments[name].default, about) for name, about in TASKS[task].about.items()}
    return settings | {name: (default, settings[name][1]) for name, default in TASKS[task].settings.items()}


def configure(task, loss, N, seed, **changes):
    """All settings of a run. A change that would do nothing is not made. Raises ValueError where one does not fit."""
    if loss == "ce" or (loss, N) == ("limited", 1):
        loss, N = "ce", 1  # the limited loss with N = 1 is cross-entropy, which has no other N
    settings, only_for = settings_of(task), {"pass_over": ["limited"]} | TASKS[task].only_for
    config, changes = {}, changes | {"loss": loss, "N": N, "seed": seed}
    require(loss in LOSSES, f"{loss} is no loss: choose from {', '.join(LOSSES)}")
    for name in changes:
        require(name in settings, f"{name} is no setting of the task {task}; leave it out")
    for name, (default, _) in settings.items():
        value = changes.get(name, default) if loss in only_for.get(name, [loss]) else default
        if not isinstance(value, str):
            kind = int if name == "N" else type(default)
            low = 1 if kind is int and default and name != "epochs" else 0
            require(low <= value <= 1_000_000 and kind(value) == value,
                    f"{name} = {value}: give {kind.__name__} from {low} to 1,000,000")
            value = kind(value)
        config[name] = value
    require(config["n_embd"] % config["n_head"] == 0, "n_embd must be a multiple of n_head")
    require(N <= (config.get("reinforce") or N), f"reinforce: pass@{N} cannot be estimated from fewer than {N} tries")
    return config


def parse_arguments(argv):
    """The options, with `jobs`: the arguments of `train` for every run, seed by seed. Refuses wrong and useless flags."""
    devices = ["cpu", *["mps"] * torch.backends.mps.is_available(), *["cuda"] * torch.cuda.is_available()]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = fail
    add, one_of_two = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--task", choices=TASKS, default=[*TASKS][0], help="what to train on; the defaults below are its own")
    one_of_two("--frontier", dest="N", action="store_const", const=[*COLUMNS], help="short for --N 1 8 64 512")
    add("--seeds", type=int, default=1, help="train with that many seeds, from --seed on")
    add("--tries", type=int, default=64, help="N of the table and the figure (default: 64)")
    add("--theory", action="store_true", help="train nothing: draw why each loss does what it does")
    add("--device", choices=["auto", *devices], default="auto", help="auto: cuda, or else cpu")
    add("--out", default="out", help="the folder for runs and figures")
    task = parser.parse_known_args(argv)[0].task
    add("-h", "--help", action="help", help="show this")
    settings = settings_of(task)
    for name, (default, about) in settings.items():
        takes = {"action": "store_true"} if default is False else {"type": type(default)}
        if isinstance(default, list):
            takes = {"type": type(default[0]), "nargs": "+"}
        (one_of_two if name == "N" else add)(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS,
                                        help=f"{about} (default: {default})", **takes)
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name in settings and value is not None}
    require(not args.theory or args.seeds == 1 and {*given} <= {"N"}, "--theory trains nothing: of the settings give --N alone")
    loss, args.N, seed = (given.pop(name, settings[name][0]) for name in ("loss", "N", "seed"))
    most = TASKS[task].num_samples or 1_000_000
    require(1 <= args.tries <= most and 1 <= args.seeds, f"give --tries from 1 to {most:,}, and --seeds from 1")
    configs = []
    for seed, loss, N in product(range(seed, seed + args.seeds), loss, args.N):
        config = configure(task, loss, N, seed, **given)
        configs += [config] * (config not in configs)  # cross-entropy comes once
    for name, value in given.items():
        require(any(config[name] == value for config in configs), f"{name} does nothing for these losses; leave it out")
    shared = {"task": task, "out": args.out, "tries": args.tries}
    shared["device"] = args.device.replace("auto", "cuda" if "cuda" in devices else "cpu")
    args.jobs = [config | shared | {"place": i % os.cpu_count()} for i, config in enumerate(configs)]
    return args


def fail(message):
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def run_job(job):
    """One run, on one thread: more gain little for models this small, and fight with whatever else is running. Returns
    whether it was finished."""
    torch.set_num_threads(1)
    try:
        run, _ = train(**job)
    except (FloatingPointError, MemoryError, RuntimeError) as error:
        print(f"{name_of(job)}: {(str(error).strip() or repr(error)).splitlines()[0]}", file=sys.stderr)
        return False
    print(f"{run['label']}, seed {run['seed']}: {run['history'][-1]['seconds']:.0f} s", file=sys.stderr)
    return True


def name_of(job):
    return f"{job['loss']} N={job['N']}, seed {job['seed']}"


def run_in_process(job):
    """The same in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=run_until_orphaned, args=(job,))
    process.start()
    process.join()
    if process.exitcode < 0:
        print(f"{name_of(job)}: killed, perhaps for want of memory", file=sys.stderr)
    return process.exitcode == 0


def run_until_orphaned(job):
    """The same, but end with the parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    tqdm.set_lock(threading.RLock())  # one that leaves nothing behind
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    try:
        sys.exit(not run_job(job))
    except (OSError, ValueError) as error:
        fail(f"{name_of(job)}: {error}")


def run_all(jobs):
    """Whether each job was finished. On a CPU as many run at a time as it has cores."""
    if len(jobs) == 1 or jobs[0]["device"] != "cpu" or os.cpu_count() == 1:
        return [*map(run_job, jobs)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            return [*pool.map(run_in_process, jobs)]
        finally:  # Ctrl-C ends all
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()


def main(argv=None):
    """Train and report, or draw the theory. Returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # some consoles cannot print →
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    out = Path("out")
    try:
        args = parse_arguments(argv)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        if args.theory:
            draw_theory(args.N[-1], out / "theory.png")
            return 0
        finished = run_all(args.jobs)
        if any(finished):
            rows = load_runs(out, args.task)
            draw(rows, args.tries, out / f"{args.task}.png")
            own = [row for row in rows if any(is_of(job, row[0]) for job in args.jobs)]
            if len(own) == len({row[0]["N"] for row in own}) > 2:
                draw_frontier({args.task: own}, out / f"{args.task}-frontier.png")
            print_table(rows, args.tries)
            print_tries(rows)
        return 0 if all(finished) else 2
    except KeyboardInterrupt:
        print(f"\nInterrupted. In {out} are the finished runs, *.json, and what was measured of others, *.partial.",
              file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror}; what was saved before is kept")
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    status = main()
    if status == 130:  # end as Ctrl-C does, so that a shell's loop ends too
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    sys.exit(status)
