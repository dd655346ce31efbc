"""pass@N, and a loss that trains for it.

Cross-entropy makes a model overconfident, overconfidence wastes tries, and one changed line in the loss stops it. This
is a small, complete reimplementation of Chen, Raventós, Cheng, Ganguli and Druckmann, "Rethinking Fine-Tuning when
Scaling Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning" (arXiv 2502.07154):

    python passn.py                          # train with both losses and draw what happens
    python passn.py --loss limited --N 64    # one run

Read it from the top. Sections 1, 2 and 4 are the paper: half an hour. Section 3 is the model, section 5 the theory.
Stop there: 6 and 7 make the table, the figure and the command line."""

import math
import time
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from tqdm import tqdm

from toy_tasks import END, PAD, TASKS, choose, require, with_changes

# For sections 6 and 7:
import argparse
import inspect
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import Counter
from itertools import product
from pathlib import Path

# ==== 1. pass@N ===========================================================================================
#
# A model answers a problem by sampling. Let p be the probability that one try is right. Give the model N tries, and
# count the problem as solved if any of them is right. All N fail with probability (1 - p)^N.

def pass_at_n(p, N):
    """pass@N = 1 - (1 - p)^N of each problem, exactly.

    p: success probabilities, a number or a tensor of any shape; N: a number, or one for each problem. Returns float64
    on the CPU, nan where p is nan. Computed through log(1 - p), so that p = 1e-12 and N = 1,000,000 lose no digit.
    Raises ValueError where p is not within 0 and 1 (rounding errors of a millionth pass) or N < 1."""
    p, N = as_float64(p), number_of_tries(N)
    require(not (abs(p - 0.5) > 0.500001).any(), "p is a probability, from 0 to 1")
    return -torch.expm1(N * torch.log1p(-p.clamp(0, 1)))


def as_float64(x):
    """x as float64 on the CPU: float32 would lose the digits of N log(1 - p), and Apple's GPUs have no float64."""
    if isinstance(x, torch.Tensor):
        return x.cpu().double()
    return torch.tensor(np.asarray(x, dtype=np.float64))


def number_of_tries(N):
    N = as_float64(N)
    require((N >= 1).all(), f"N is a number of tries, 1 or more; got {N.tolist()}")
    return N


def estimate_pass_at_n(num_samples, num_correct, N):
    """Unbiased estimate of pass@N from n samples, c of them right, where p is unknown: of all choices of N samples, the
    share that holds a right one, 1 - C(n - c, N) / C(n, N) = 1 - Π_{j<c} (1 - N / (n - j)). Each argument: a whole
    number, or a row or tensor of them; they broadcast. Returns float64 on the CPU. Raises ValueError where N > n or c
    is not within 0 and n. Source: Chen et al. 2021, arXiv 2107.03374."""
    n, c, N = as_float64(num_samples), as_float64(num_correct), as_float64(N)
    is_whole = n % 1 + c % 1 + N % 1 == 0
    is_possible = is_whole & (0 <= c) & (c <= n) & (0 <= N) & (N <= n)
    require(is_possible.all(), "num_correct and N are whole numbers from 0 to num_samples: draw at least N samples")
    all_fail = torch.ones_like(n + c + N)
    for j in range(int(max(c.flatten().tolist(), default=0))):
        all_fail *= torch.where(j < c, (1 - N / (n - j)).clamp(min=0), 1.0)
    return 1 - all_fail


# ==== 2. The losses =======================================================================================
#
# Cross-entropy, -log p with p of the right answer, asks that the first try be right. With N tries, ask that any of them
# be right: minus the logarithm of pass@N. That is the whole idea. What it changes shows in the gradient:
#
#     d/dθ [-log(1 - (1 - p)^N)] = F(N, p) · d/dθ [-log p],      F(N, p) = N p (1 - p)^(N-1) / (1 - (1 - p)^N)
#
# This is the chain rule, with dp = p · d log p. Where p is small, (1 - p)^N is e^(-N p), and F depends on u = N p
# alone, the number of right answers to expect among N: F ≈ u / (e^u - 1). While p is far below 1/N, F ≈ 1, and the
# example pulls as it does under cross-entropy. Around 1/N the pull fades: F ≈ 0.58 at p = 1/N, 0.16 at 3/N, 0.03 at
# 5/N. So an example that N tries solve gets almost no gradient, and the model grows little surer of it: the loss limits
# confidence. With N = 1, F is 1 for every p: that is cross-entropy.

def dco_loss(log_p, N):
    """The limited loss (the paper's Direct Coverage Optimization): L_N = -log(1 - (1 - p)^N) of each example, in nats.

    log_p: (B,) log-probabilities of the right answers, each the sum over the answer's tokens; N: a number, or (B,) one
    for each example. Returns (B,), in the dtype of log_p: take the mean and call backward. Relative error to 1e-5 in
    float32, 1e-12 in float64, for N to 1,000,000 and log_p to -2000, where p itself has long underflowed. Raises
    ValueError for N < 1, for log_p of integers, and for log_p > 0, which is no log-probability (a loss, perhaps: change
    its sign)."""
    # return -torch.log(1 - (1 - p) ** N)   # for p = log_p.exp(): the same, but infinite where 1 - p rounds to 1
    x, N, log_fail = checked(log_p, N)
    rest = x.clamp(min=-50) - x  # where p < e^-50: go on as a straight line in log p, slope -1
    return torch.where(N == 1, -x, rest - log1mexp(N * log_fail)).to(log_p)  # N = 1: slope -1 at p = 1, too


def overconfidence_factor(log_p, N):
    """F(N, p) = N p (1 - p)^(N-1) / (1 - (1 - p)^N) of each example, from 1 down to 0: the share of cross-entropy's
    gradient that the limited loss keeps, F = -d L_N / d log p. It is small where the model is surer than N tries need.

    Arguments, precision and errors as in `dco_loss`. To weight cross-entropy by F yourself, detach F."""
    # return N * p * (1 - p) ** (N - 1) / (1 - (1 - p) ** N)   # for p = log_p.exp(): the same, with the same trouble
    x, N, log_fail = checked(log_p, N)
    log_factor = torch.log(N) + x.clamp(-50, 0) + (N - 1) * log_fail - log1mexp(N * log_fail)
    return torch.where(N == 1, 1.0, log_factor.exp()).to(log_p)


def checked(log_p, N):
    """log p, N and log(1 - p), in float64. log(1 - p) is taken for p within e^-50 and just below 1."""
    require(log_p.is_floating_point(), "log_p is a tensor of floating-point numbers")
    require(not (log_p > 1e-3).any(), "log_p is a log-probability, 0 or less: is its sign lost?")
    x = as_float64(log_p)
    return x, number_of_tries(N), log1mexp(x.clamp(-50, -1e-300))


def log1mexp(x):
    """log(1 - e^x) for x < 0, by whichever of two forms does not cancel (Mächler 2012)."""
    near_zero = x > -math.log(2)
    by_expm1 = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    by_log1p = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, by_expm1, by_log1p)


# Reinforcement learning with a verifier climbs the mean of pass@N, not of its logarithm; usually with N = 1, the mean
# of p. The gradient of each loss is d log p with a weight, which has two dials:
#
#                            N = 1                     N = 64
#     mean of log pass@N     1: cross-entropy          F(N, p): the limited loss
#     mean of √pass@N        √p                        √pass@N · F: the root loss
#     mean of pass@N         p: the usual reward       pass@N · F, which is N p (1 - p)^(N-1)
#
# The row sets how much hard examples count: fully under the log, however small their p; in proportion to pass@N under
# the mean; the root lies between. The column sets whether easy ones stop pulling: with N = 64 beyond a few 1/64, with
# N = 1 only at p = 1.

def reward_loss(log_p, N, power=1):
    """Minus the mean of pass@N^power / power over a batch, a scalar. Reinforcement learning for pass@N climbs the mean
    of pass@N, by estimates; here its gradient is exact. log_p: (B,); power: above 0; N and errors as in `dco_loss`.
    Computed in float64."""
    log_pass = -dco_loss(as_float64(log_p), N)  # through the logarithm the gradient is finite at p = 1
    return -(power * log_pass).exp().mean().to(log_p) / power


def pass_at_n_weights(num_samples, num_correct, N):
    """The weight of each right try in an unbiased estimate of the gradient of pass@N, from n tries, c of them right:

        ∇ pass@N ≈ Σ_right w ∇ log π(try),      w = N/n · C(n - c, N - 1) / C(n - 1, N - 1).

    w is N/n times the unbiased estimate of (1 - p)^(N-1), the chance that N - 1 other tries all fail: the idea of F
    once more. A wrong try weighs 0. With N = 1, w = 1/n: plain REINFORCE.
    Arguments, shapes and errors as in `estimate_pass_at_n`. Source: Walder and Karkhanis 2025, arXiv 2505.15201."""
    n, c, N = as_float64(num_samples), as_float64(num_correct), number_of_tries(N)
    others_solve = estimate_pass_at_n(n - 1, c - 1 * (c > 0), N - 1)
    return (c > 0) * N / n * (1 - others_solve)


LOSSES = {  # from the batch's log_p (B,) and N to the number that is minimized
    "ce": lambda log_p, N: -log_p.mean(),
    "limited": lambda log_p, N: dco_loss(log_p, N).mean(),
    "root": lambda log_p, N: reward_loss(log_p, N, power=0.5),
    "reward": reward_loss,
}

# ==== 3. A small GPT ======================================================================================
#
# The usual decoder: token and position embeddings, blocks of attention and MLP, logits for the next token. Tasks ask it
# for the probability of a given answer, and for sampled answers. Two things save time and change no number. `last`: the
# last block computes only the last few positions, the answer's (0: all). `past`: the keys and values of what was read
# before are kept, while sampling, and where many texts begin alike.

class Block(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1 = nn.LayerNorm(n_embd)
        self.query = nn.Linear(n_embd, n_embd)
        self.key_value = nn.Linear(n_embd, 2 * n_embd)
        self.projection = nn.Linear(n_embd, n_embd)
        self.ln_2 = nn.LayerNorm(n_embd)
        wide = 4 * n_embd
        self.mlp = nn.Sequential(nn.Linear(n_embd, wide), nn.GELU(), nn.Linear(wide, n_embd))

    def forward(self, x, last, past):
        """x (B, T, C), which follows on `past` -> its last positions (B, last, C), and all keys and values so far,
        (2, B, heads, T, C / heads)."""
        def heads(t):  # (…, T, C) -> (…, heads, T, C / heads)
            return t.unflatten(-1, (self.n_head, -1)).transpose(-3, -2)
        normed = self.ln_1(x)
        q = heads(self.query(normed[:, -last:]))  # all, if last is 0: -0 is 0
        keys_values = heads(torch.stack(self.key_value(normed).chunk(2, dim=-1)))
        if past is not None:
            keys_values = torch.cat([past, keys_values], dim=-2)
        Q, K = q.shape[-2], keys_values.shape[-2]
        mask = torch.ones(Q, K, dtype=torch.bool, device=x.device).tril(K - Q)  # each sees itself and what is before it
        attended = scaled_dot_product_attention(q, *keys_values, mask if Q > 1 else None)
        x = x[:, -last:] + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x)), keys_values


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
        return self.read(tokens)[0]

    def read(self, tokens, last=0, past=None):
        """The logits at the last positions of tokens (0: all), and the keys and values of each block: the `past` of the
        tokens that come next."""
        start = past[0].shape[-2] if past else 0
        tokens = tokens.to(self.head.weight.device)
        x = self.token_embedding(tokens) + self.position_embedding.weight[start:start + tokens.shape[1]]
        present = []
        for i, block in enumerate(self.blocks):
            x, keys_values = block(x, last if block is self.blocks[-1] else 0, past and past[i])
            present.append(keys_values)
        return self.head(self.ln(x)), present

    def log_p(self, prompts, answers, temperature=1.0):
        """log p(y|x) = Σ_t log p(y_t | x, y_<t) of answers (B, A) to prompts (B, T): (B,), from one forward pass; where
        several temperatures are given, (temperatures, B). Padding after an answer does not count."""
        texts = torch.cat([prompts, answers[:, :-1]], dim=1)
        logits = self.read(texts, answers.shape[1])[0].cpu()
        log_ps = []
        for each in np.atleast_1d(temperature):
            losses = cross_entropy(logits.mT / each, answers, ignore_index=PAD, reduction="none")
            log_ps.append(-losses.sum(dim=1))
        return torch.stack(log_ps).squeeze(0)

    @torch.no_grad()
    def sample(self, prompts, length, temperature=1.0, number=1):
        """Answers (B · number, length): `number` tries at each prompt (B, T), which is read once. Each next token is
        drawn from softmax(logits / temperature), the likeliest one at temperature 0. After END comes padding only."""
        tokens, past, answers = prompts, None, []
        for i in range(length):
            logits, past = self.read(tokens, 1, past)
            if i == 0:
                logits = logits.repeat_interleave(number, dim=0)
                past = [keys_values.repeat_interleave(number, dim=1) for keys_values in past]
            tokens = choose((logits / max(temperature, 1e-6)).softmax(dim=-1))
            answers.append(tokens)
        answers = torch.cat(answers, dim=1).cpu()
        is_end = answers == END
        return answers.masked_fill(is_end.cumsum(dim=1) > is_end, PAD)  # behind the first END

# ==== 4. Training =========================================================================================
#
# One loop for every loss and task:
#
#     for epoch in range(epochs):
#         for batch in torch.randperm(len(answers)).split(batch_size):
#             log_p = model.log_p(prompts[batch], answers[batch])
#             LOSSES[loss](log_p, N).backward()
#             optimizer.step()
#             optimizer.zero_grad()
#
# In the real loop a task, from toy_tasks.py, gives log p of training examples, p of all test problems, and tries to
# look at. It may imitate a part of a try, such as one step of a proof. Then its log_p has the step's gradient, but the
# whole try's value, on which F depends; `refresh` updates that value.
#
# F shrinks, but stays above zero, and Adam divides a gradient by its own recent size: once all gradients are small,
# steps are full-size again, and p drifts on. Two things hold it back. Adam's `eps`, far above the usual 1e-8, leaves
# small gradients small. And training passes over (skips) examples that N tries already solve, those with F < 0.1 (p
# beyond 3.6/N, for large N), as the paper's own code does. The rest wait in a queue until they fill a batch.

SETTINGS = {  # defaults of every task; each is a flag, --learning-rate 3e-3, and its comment is the flag's help
    "epochs": 100,  # times through the training examples
    "evaluations": 10,  # how many measurements, about, at equal distances
    "batch_size": 50,  # examples in one update
    "learning_rate": 3e-3,  # at its peak
    "weight_decay": 0.0,  # AdamW's
    "eps": 1e-3,  # Adam's
    "pass_over": 0.1,  # the limited and the root loss pass over examples with F(N, p) below this; 0: none
    "n_layer": 2,  # blocks of the model
    "n_head": 4,  # attention heads
    "n_embd": 64,  # width of the model
    "start": "",  # a task that cross-entropy trains the model on first; "": the model starts from random weights
    "start_epochs": 10,  # how long
}


@torch.random.fork_rng()  # the caller's random numbers stay as they are
def train(task, loss="limited", N=64, seed=0, out="", device="cpu", place=0, **changes):
    """Train a new model on a task, given by its name. Returns the run, a dictionary of what was measured, and the
    model. `seed` decides the problems, the first weights and all chance. `changes` are to the task's settings:
    epochs=10. In the folder `out`, if given, the run is saved. `place` is the line of the progress bar. Raises
    ValueError where a setting does not fit, and FloatingPointError where training diverges."""
    N = 1 if loss == "ce" else N  # cross-entropy is N = 1
    config = configure(task, loss, N=N, seed=seed, **changes)
    settings = SimpleNamespace(**config)
    N, seed = settings.N, settings.seed
    torch.manual_seed(seed)
    problems = TASKS[task](**config)
    require(settings.batch_size <= problems.size, f"batch_size: there are only {problems.size} training examples")
    model = problems.new_model(GPT, settings.n_layer, settings.n_head, settings.n_embd).to(device)
    if settings.start:
        alike = {name: config[name] for name in ("n_layer", "n_head", "n_embd", "num_test") if name in config}
        first = train(settings.start, "ce", seed=seed, device=device, place=place,
                      epochs=settings.start_epochs, evaluations=1, **alike)[1].state_dict()
        require([*map(len, first.values())] == [*map(len, model.state_dict().values())],
                f"start: the model of {settings.start} does not fit {task}")
        model.load_state_dict(first)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), eps=settings.eps,
                                  weight_decay=settings.weight_decay, fused=device != "mps")
    run = new_run(task, loss, N, seed, config, problems)
    order = torch.Generator().manual_seed(seed)  # of the examples, the same for every loss
    queue, updates, start = torch.arange(0), 0, time.perf_counter()
    for epoch in tqdm(range(settings.epochs + 1), f"{run['label']}, seed {seed}", leave=False,
                      position=place, disable=not sys.stderr):
        is_last = epoch == settings.epochs
        is_measured = is_last or epoch % math.ceil(settings.epochs / settings.evaluations) == 0
        if is_measured or loss != "ce":
            problems.refresh(model, epoch)
        if is_measured:
            run["history"].append({"epoch": epoch, "updates": updates, "seconds": time.perf_counter() - start}
                                  | evaluate(problems, model, loss, N))
            run["tries"] = problems.show_tries(model, 64)
            if out:
                save(run, out, is_last)
        if is_last:
            break
        parts = torch.randperm(problems.size, generator=order).split(settings.batch_size)
        for i, examples in enumerate(parts):
            if settings.pass_over > 0 and loss in problems.only_for["pass_over"]:
                with torch.no_grad():
                    factor = overconfidence_factor(problems.log_p(model, examples), N)
                examples = examples[factor >= settings.pass_over]
            queue = torch.cat([queue, examples])
            if len(queue) < settings.batch_size:
                continue
            batch, queue = queue[:settings.batch_size], queue[settings.batch_size:]
            LOSSES[loss](problems.log_p(model, batch), N).backward()
            progress = (epoch + i / len(parts)) / settings.epochs
            optimizer.param_groups[0]["lr"] = settings.learning_rate * schedule(progress)
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
    return run, model


def schedule(progress):
    """The learning rate's share of its peak: a cosine down to a tenth, times a rise over the first 5 % of training."""
    warm_up = min(1, 0.01 + progress / 0.05)
    return warm_up * (0.55 + 0.45 * math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(problems, model, loss, N):
    """Loss and mean p on every fourth training example; p and mean confidence on the test problems. Confidence is the
    probability that the model gives its own greedy answer, right or wrong."""
    log_p = problems.log_p(model, torch.arange(0, problems.size, 4))
    if log_p.isnan().any():
        raise FloatingPointError("diverged: try a smaller --learning-rate or --weight-decay")
    p, confidence = problems.measure(model)
    return {"loss": LOSSES[loss](log_p, N).item(), "train_p": log_p.exp().mean().item(),
            "confidence": confidence.mean().item(),
            "p": [[float(f"{value:.6g}") for value in values] for values in p.tolist()]}

# ==== 5. Theory ===========================================================================================
#
# With one answer that can be learned, both losses are least at p = 1, but the limited one hardly pulls beyond a few
# 1/N. Where the answer stays uncertain, their optima differ. To see that, take the network away. Let there be many
# questions that the model cannot tell apart: answer i is right in a share f_i of them, and a policy q gives it the
# probability q_i. Then pass@N = Σ_i f_i (1 - (1 - q_i)^N). At the optimum no probability can be moved at a profit:
# every answer in use has the same marginal gain λ, and an unused one gains no more.

def optimal_policy(f, N, power=1):
    """The policy q that maximizes pass@N over Σ_i q_i = 1. The reward loss tends to it. The gain is N f_i (1 -
    q_i)^(N-1), so q_i = max(0, 1 - (λ / (N f_i))^(1/(N-1))): water-filling. The larger N, the flatter. With N = 1 all
    of q is on the likeliest answer. For Σ_i f_i pass@N(q_i)^power, power from 0 to 1 (0: its logarithm), the gain has a
    factor of pass@N(q_i)^(power - 1). The gain falls with q: a table of its logarithm gives q for any λ, and bisection
    finds log λ. f: (K,) numbers from 0 on, not all 0, of any scale. Returns (K,), float64 numpy, sum 1. Raises
    ValueError for any other f, and for N < 1."""
    f, N = np.asarray(f, dtype=np.float64), number_of_tries(N).item()
    require(f.min() >= 0 < f.max() < math.inf, "f is a row of numbers from 0 on, not all 0")
    log_f = np.log(f / f.max() + 1e-300)
    q = 1 / (1 + np.exp(-np.linspace(-60, 36, 200_000)))
    steepness = max(N - 1, 1e-9)  # for N = 1 the gain of pass@N does not fall; let it, but hardly
    log_gain = steepness * np.log1p(-q) + (power - 1) * np.log(pass_at_n(q, N).numpy())
    low, high = log_gain[-1], 60.0
    for _ in range(100):
        middle = (low + high) / 2
        policy = (f > 0) * np.interp(middle - log_f, log_gain[::-1],
                                     q[::-1], right=0)
        low, high = (low, middle) if policy.sum() < 1 else (middle, high)
    return policy / policy.sum()


def limited_policy(f, N):
    """The policy q that minimizes the limited loss, Σ_i f_i L_N(q_i) over Σ_i q_i = 1: where that loss tends.
    The gain is f_i F(N, q_i) / q_i. Where q_i ≪ 1/N, that is f_i / q_i: q is in proportion to f, as under cross-entropy
    (N = 1: q = f). Beyond 1/N it is held back. No answer is given up. Arguments and errors as in `optimal_policy`."""
    return optimal_policy(f, N, power=0)


def confident_pass_at_n(c, N, a, K):
    """The one-parameter picture. A model puts probability c, its confidence, on its favourite answer, which is right
    with probability a, and spreads the rest evenly over the K - 1 others:
        pass@N(c) = a (1 - (1 - c)^N) + (1 - a) (1 - (1 - (1 - c) / (K - 1))^N).
    At c = 1 that is a for every N: no amount of sampling helps. c: a number or an array."""
    return a * pass_at_n(c, N) + (1 - a) * pass_at_n((1 - c) / (K - 1), N)

# ==== 6. Runs, table and figures ==========================================================================
#
# Nothing from here on is needed to understand the rest. Table and figure are made from saved runs: p of every problem.

COLUMNS = [1, 8, 64, 512]  # numbers of tries that figures mark, and that --frontier trains for
COLORS = {  # for the colour-blind (Okabe, Ito)
    "ce": "#D55E00", "limited": "#0072B2", "root": "#CC79A7", "reward": "#009E73"}


def new_run(task, loss, N, seed, config, problems):
    """A run that has measured nothing yet. Its label names the settings that are not as usual, but no paths."""
    usual = SETTINGS | TASKS[task].settings
    config = {name: config[name] for name in usual if name not in problems.paths}
    label = "cross-entropy" if loss == "ce" else f"{loss} N={N}"
    label += "".join(f", {name}={config[name]}" for name in config if config[name] != usual[name])
    return {"task": task, "loss": loss, "N": N, "seed": seed, "label": label, "config": config,
            "num_samples": problems.num_samples, "temperatures": problems.temperatures,
            "history": [], "baselines": problems.baselines(optimal_policy)}


def folder(out):
    path = Path(out).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def save(run, out, is_finished):
    """Write a run to *.partial, which takes the name *.json when it is finished: that is whole or not there at all."""
    name = re.sub("[, ]+", "-", f"{run['task']}-{run['label']}-seed{run['seed']}")
    partial = folder(out) / f"{name}.partial"
    partial.write_text(json.dumps(run))
    if is_finished:
        partial.replace(partial.with_suffix(".json"))


def load_runs(out, task, seeds):
    """A task's finished runs of some seeds: rows, each of runs that differ in the seed only, cross-entropy first."""
    rows = {}
    for path in sorted(filter(Path.is_file, Path(out).glob(f"{task}-*.json"))):
        try:
            run = json.loads(path.read_text())
            numbers = pass_at(run, 1)[:, 0] + curve([run], "epoch") + curve([run], "confidence")
            require(np.isfinite(numbers).all() and run["N"] > 0 and run["tries"], "it lacks something")
            row = (run["loss"], run["N"], json.dumps(run["config"]),
                   len(run["history"][0]["p"][0]))  # the number of problems
            if run["task"] == task and run["seed"] in seeds:
                rows.setdefault(row, []).append(run)
        except (LookupError, TypeError, ValueError) as error:
            print(f"left out {path}, which is no run of this version ({error!r})", file=sys.stderr)
    return [*map(rows.get, sorted(rows))]


def pass_at(run, N):
    """pass@N in the test: (epochs, temperatures), the first temperature 1. From samples, nan if these are too few."""
    n, p = run["num_samples"], np.array([record["p"] for record in run["history"]])
    if n is None:
        return pass_at_n(p, N).mean(dim=-1).numpy()
    estimate = estimate_pass_at_n(n, (n * p).round(), min(N, n))
    return estimate.mean(dim=-1).numpy() if N <= n else math.nan * p.mean(axis=-1)


def stack(row, N):
    """pass@N of a row's runs: (seeds, epochs, temperatures)."""
    return np.array([pass_at(run, N) for run in row])


def curve(row, name):
    """What the records of a row's runs hold under a name: (seeds, epochs)."""
    return np.array([[record[name] for record in run["history"]] for run in row], dtype=float)


def over_seeds(values):
    """Mean and standard error over the first axis, the seeds; an error of 0 where there is only one."""
    return values.mean(axis=0), values.std(axis=0, ddof=len(values) > 1) / len(values) ** 0.5


def at_best(row, N):
    """pass@N in the best epoch, and at the best temperature too: (seeds,). Chosen on the test set, which flatters."""
    every = stack(row, N)
    return every[..., 0].max(axis=1), every.max(axis=(1, 2))


def baselines_at(rows, N):
    """{name: pass@N (seeds,)} of who never reads, from the row with the most seeds."""
    row = max(rows, key=len)
    return {name: np.array([pass_at_n(run["baselines"][name], N).mean() for run in row])
            for name in row[0]["baselines"]}


def print_table(rows, N):
    """A line for each loss and its settings, and for the baselines: mean over the seeds ± standard error."""
    Ns, lines = sorted({1, 8, N}), {}
    for row in rows:
        lines[row[0]["label"]] = [*(stack(row, n)[:, -1, 0] for n in Ns),
                                  curve(row, "confidence")[:, -1], *at_best(row, N)]
    for name in baselines_at(rows, N):
        lines[name] = [baselines_at(rows, n)[name] for n in Ns]
    width = max(map(len, lines))
    headers = (f"{f'pass@{n}':>10}" for n in Ns)
    print(" " * width, "seeds", *headers, f"confidence {f'best@{N}':>10}   & best T")
    for name, columns in lines.items():
        cells = []
        for mean, error in map(over_seeds, columns):
            cell = f"{mean:.3f}{'' if len(columns[0]) == 1 else f'±{error:.3f}'}"
            cells.append(cell.replace("0.", ".").rjust(10))
        print(name.ljust(width), f"{len(columns[0]):5}", *cells)


def print_tries(rows):
    """What 64 tries at the first three test problems gave under each loss: overconfidence to the naked eye."""
    print("64 tries at the first three test problems, and how often the commonest came:")
    first = rows[0][0]["tries"][0][0]
    runs = [row[0] for row in rows if row[0]["tries"][0][0] == first]
    for same_problem in zip(*(run["tries"] for run in runs)):
        print(same_problem[0][0])
        for run, (_, num_right, tries) in zip(runs, same_problem):
            counts = Counter(tries)
            commonest = ", ".join(f"{text} ({count})" for text, count in counts.most_common(4))
            print(f"  {run['label']}: {num_right} right, {len(counts)} different; {commonest}")


def draw(rows, N):
    """pass@N, pass@1 and confidence as training goes on; and pass@n at its end, as a share of the best at that n."""
    from matplotlib.figure import Figure  # here, since it takes a while
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplot_mosaic("NN.;1cn", height_ratios=(5, 4))
    ns, ends = 2 ** np.arange(10), {}
    at_end = [[stack(row, n)[:, -1, 0].mean() for n in ns] for row in rows]
    shares = at_end / np.maximum(np.max(at_end, axis=0), 1e-9)
    for row, share in zip(rows, shares):
        run = row[0]
        alpha = 255 if run["loss"] == "ce" else 255 - 150 / run["N"] ** 0.25  # paler for fewer tries
        color = f"{COLORS.get(run['loss'], '#CC79A7')}{int(alpha):02x}"
        pass_N = stack(row, N)[..., 0]
        for place, values in (("N", pass_N), ("1", stack(row, 1)[..., 0]),
                              ("c", curve(row, "confidence")[:, 1:])):  # untrained, a greedy answer is often none
            panels[place].errorbar(curve(row, "epoch")[0, -values.shape[1]:],
                                   *over_seeds(values), color=color)
        panels["n"].plot(ns, share, marker="o", color=color,
                         markevery=[abs(ns - run["N"]).argmin()])
        ends[run["label"]] = pass_N[:, -1].mean(), color
    names = f"{rows[0][0]['label'].partition(',')[0]}: best epoch", "the same, and best temperature"
    for name, values in (*zip(names, at_best(rows[0], N)),
                         *baselines_at(rows, N).items()):
        panels["N"].axhline(values.mean(), color="grey", linestyle=":")
        ends[name] = values.mean(), "grey"
    height = 2
    for name in sorted(ends, key=ends.get)[::-1]:  # beside each line its name, none over another
        end, color = ends[name]
        height = min(end, height - 0.06)
        panels["N"].text(1.02, height, name, color=color, va="center", in_layout=False,
                         size=min(10, 360 / max(map(len, ends))), transform=panels["N"].get_yaxis_transform())
    panels["c"].axhline(1 / N, color="grey", linestyle=":")
    panels["N"].set(title=f"pass@{N} on test problems", xlabel="epoch", ylim=(0, 1))
    panels["1"].set(title="pass@1", xlabel="epoch", ylim=0)
    panels["c"].set(title=f"confidence (dotted: 1/{N})", xlabel="epoch", ylim=(0, 1))
    panels["n"].set(title="pass@n at the end / the best", xlabel="tries n (dot: trained for n)", xscale="log")
    panels["n"].set(xticks=COLUMNS, xticklabels=COLUMNS, ylim=(0, 1.03))
    return figure


def draw_theory(N):
    """The theory in four panels, in the order of the argument."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 8), layout="constrained")
    one, many, policies, confidence = figure.subplots(2, 2).flat
    log_p = torch.linspace(-9, 0, 500, dtype=torch.float64, requires_grad=True)
    for axis, n, log in ((one, 1, "ce"), (many, N, "limited")):
        axis.set(title=f"weight of an example in ∇ log p, N = {n}", xlabel="p of a right try")
        for loss in (log, "root", "reward"):
            gradient, = torch.autograd.grad(LOSSES[loss](log_p, n) * len(log_p), log_p)
            axis.plot(log_p.exp().tolist(), -gradient, color=COLORS[loss], label=loss)
    rank = np.arange(1, 101)
    f = rank**-1.2
    for loss, q in {"ce": f / f.sum(), "limited": limited_policy(f, N),
                    "root": optimal_policy(f, N, power=0.5), "reward": optimal_policy(f, N)}.items():
        policies.plot(rank, q, color=COLORS[loss], label=loss)
    policies.set(title=f"where each loss tends, N = {N}, if the question\nleaves open which of 100 answers is right",
                 xlabel="answer, by rank r: right in a share ~ 1 / r^1.2", ylabel="probability given to it",
                 yscale="log", ylim=1e-4)
    c = np.geomspace(0.002, 1, 1000)
    for n in COLUMNS:
        pass_at_c, grey = confident_pass_at_n(c, n, 0.1, 500), f"{0.75 - math.log2(n) / 12}"
        best = pass_at_c.argmax()
        confidence.plot(c, pass_at_c, marker="o", markevery=[best], color=grey, label=f"N = {n}")
    confidence.set(title="the best confidence (dot) falls as N grows,\nif the favourite of 500 is right in a tenth",
                   xlabel="confidence: probability given to the favourite", ylabel="pass@N")
    for axis in figure.axes:
        axis.set(xscale="log")
        axis.legend()
    return figure


def save_figure(figure, path):
    """Write a PNG, whole or not at all."""
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=150)
    partial.replace(path)
    print(f"Figure: {path}")

# ==== 7. Settings and command line ========================================================================

OPTIONS = {  # of the command line, beside a task's settings
    "loss": [],  # one or more of the losses
    "N": [],  # tries to train for, one number or more
    "seed": 0,  # of the problems, the first weights and all chance
    "seeds": 1,  # train with that many seeds, from --seed on
    "tries": 64,  # N of the table and the figure
    "theory": False,  # train nothing: draw why each loss does what it does
    "device": "cuda" if torch.cuda.is_available() else "cpu",  # where to train
    "out": "out",  # the folder for runs and figures
}


def configure(task, loss, **changes):
    """All settings of a run, with those changes that do something for this loss. Raises ValueError where one is bad."""
    changes = {name: value for name, value in changes.items() if loss in TASKS[task].only_for.get(name, LOSSES)}
    usual = {"N": 64, "seed": 0} | SETTINGS | TASKS[task].settings
    config = with_changes(usual, changes)
    if not config["start"]:
        config["start_epochs"] = usual["start_epochs"]  # they do nothing
    require(config["pass_over"] < 1, "pass_over must be below 1: F is never above it")
    require(config["start"] in ["", *TASKS], f"start: {config['start']} is no task")
    return config


def parse_arguments(argv):
    """The options, and the arguments of `train` for every run, seed by seed."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.error, add = fail, parser.add_argument
    add("--task", choices=TASKS, default="multiply", help="what to train on; the defaults below are its own")
    name = parser.parse_known_args(argv)[0].task
    task, settings = TASKS[name], SETTINGS | TASKS[name].settings
    add("-h", "--help", action="help", help="show this")
    source = inspect.getsource(sys.modules[__name__]) + inspect.getsource(task)
    comments = dict(re.findall(r'"(\w+)":(?=[^#\n]*  # (.*))', source))  # {setting: the comment behind it}
    for option, usual in (OPTIONS | task.axes | settings).items():
        kind = {"action": "store_true"} if usual is False else {"type": type(usual)}
        if isinstance(usual, list):
            kind = {"type": type(usual[0]), "nargs": "+", "choices": LOSSES if option == "loss" else None}
        add(f"--{option.replace('_', '-')}", default=usual, **kind,
            help=f"{comments.get(option, '')} (default: {usual})")
    add("--frontier", dest="N", action="store_const", const=COLUMNS, help=f"short for --N {COLUMNS}")
    args = parser.parse_args(argv)
    changes = {name: value for name, value in vars(args).items() if settings.get(name, value) != value}
    plain = parser.parse_args(["--theory", f"--out={args.out}", f"--N={max(2, *args.N)}"])
    require(args == plain or not args.theory, "--theory trains nothing: give it --out and one --N from 2 on, no more")
    require(1 <= args.seeds <= 1000 and 1 <= args.tries <= 1e6, "--seeds is from 1 to 1,000, --tries to 1,000,000")
    jobs = {}
    for seed, loss, N in product(range(args.seed, args.seed + args.seeds), args.loss, args.N):
        if loss == "ce" or (loss, N) == ("limited", 1):
            loss, N = "ce", 1  # the limited loss with N = 1 is cross-entropy, which comes once
        job = {"task": name, "loss": loss, "out": args.out, "device": args.device}
        jobs[seed, loss, N] = job | configure(name, loss, N=N, seed=seed, **changes)
    for name, value in changes.items():
        require(any(job[name] == value for job in jobs.values()), f"{name} does nothing in these runs; leave it out")
    require(args.loss != ["ce"] or args.N == task.axes["N"], "N does nothing for cross-entropy; leave it out")
    return args, [*jobs.values()]


def fail(error):
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    sys.exit(2)


def run_job(job, place=0):
    """Whether one run was finished. It takes one thread: more gain little for models this small."""
    torch.set_num_threads(1)
    name = f"{job['loss']} N={job['N']}, seed {job['seed']}"
    try:
        run, _ = train(**job, place=place)
        print(f"{name}: {run['history'][-1]['seconds']:.0f} s", file=sys.stderr)
        return True
    except (ArithmeticError, MemoryError, OSError, RuntimeError, ValueError) as error:
        print(f"{name}: {(str(error) or repr(error)).splitlines()[0]}", file=sys.stderr)
        return False


def work(jobs, place):
    """What a worker process does. It ends with its parent, however that ends."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)),
                     daemon=True).start()
    tqdm.set_lock(threading.RLock())  # one that leaves nothing behind
    sys.exit(not all([run_job(job, place) for job in jobs]))


def run_all(jobs, workers):
    """Whether all jobs were finished. On a CPU, workers share them."""
    if workers == 1 or jobs[0]["device"] != "cpu":
        return all([*map(run_job, jobs)])
    spawn = multiprocessing.get_context("spawn")
    processes = []
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it: Ctrl-C is for this process
    for place in range(workers):
        processes.append(spawn.Process(target=work, args=(jobs[place::workers], place), daemon=True))
        processes[-1].start()
    signal.signal(signal.SIGINT, handler)
    for process in processes:
        process.join()
        if process.exitcode < 0:
            print("a worker was killed, perhaps for want of memory; its runs are missing", file=sys.stderr)
    return not any(process.exitcode for process in processes)


def main(argv=None, workers=1):
    """Train and report, or draw the theory; returns the exit status. argv: ["--loss", "limited"]; None: the command
    line's. workers: how many processes, where the program can be started again, as they do."""
    try:
        args, jobs = parse_arguments(argv)
        out = folder(args.out)
        if args.theory:
            save_figure(draw_theory(args.N[0]), out / "theory.png")
            return 0
        is_finished = run_all(jobs, min(workers, len(jobs)))
        rows = load_runs(out, args.task, {job["seed"] for job in jobs})
        if rows:
            print_table(rows, args.tries)
            print_tries(rows)
            save_figure(draw(rows, args.tries), out / f"{args.task}.png")
        return 0 if is_finished else 2
    except KeyboardInterrupt:
        print("\ninterrupted: in --out are finished runs, *.json, and what others measured, *.partial", file=sys.stderr)
        return 130
    except (OSError, RuntimeError, ValueError) as error:
        fail(error)


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # some consoles cannot print →
    sys.exit(main(workers=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))
