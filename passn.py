"""pass@N, and a loss that trains for it.

Cross-entropy makes a model overconfident, overconfidence wastes tries, and one changed line in the loss fixes it. This is
a small, complete reimplementation of Chen, Raventós, Cheng, Ganguli and Druckmann, "Rethinking Fine-Tuning when Scaling
Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning" (arXiv 2502.07154). Read it from top to bottom, or
run it:

    python passn.py                          # train with both losses and draw what happens
    python passn.py --loss limited --N 64    # one run
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from tqdm import tqdm

from toy_tasks import PAD, TASKS, mask_after_end, part_of, proof_p, sample_attempts, show_attempts

# ==== 1. pass@N ===========================================================================================
#
# A model answers a problem by sampling. Let p be the probability that one try is right. Give the model N tries and
# count the problem as solved if any of them is right: it fails only if all N fail.


def pass_at_n(p, N):
    """pass@N = 1 - (1 - p)^N of each problem, exactly.

    p: success probabilities, a number or a tensor of any shape; N: a number, or one for each problem. Returns float64 of
    p's shape. Computed through log(1 - p), so that p = 1e-12 and N = 1,000,000 lose no digit. Raises ValueError where p is
    not within 0 and 1 (rounding errors of a millionth pass) or N < 1."""
    p, N = torch.as_tensor(p, dtype=torch.float64), check_tries(N)
    if ((p < -1e-6) | (p > 1 + 1e-6)).any():
        raise ValueError("p is a probability, from 0 to 1")
    below_1 = torch.where(p < 1, p, 0.0)  # torch.where differentiates what it does not choose, too: keep it finite
    return torch.where(p < 1, -torch.expm1(N * torch.log1p(-below_1)), 1.0)


def check_tries(N):
    N = torch.as_tensor(N, dtype=torch.float64)
    if not ((N >= 1) & N.isfinite()).all():
        raise ValueError(f"N is a number of tries, 1 or more; got {N.tolist()}")
    return N


def estimate_pass_at_n(num_samples, num_correct, N):
    """Unbiased estimate of pass@N from n samples of which c were right, for when p is unknown.

    1 - C(n - c, N) / C(n, N): of all ways to choose N of the n samples, the share with a right one among them. Computed as
    the product 1 - Π_{j<c} (1 - N / (n - j)). (Putting c / n for p into the formula above would be biased.)
    num_correct: a number or a tensor of any shape, whole numbers from 0 to n. Returns float64 of that shape, on the CPU.
    Raises ValueError where N > n or N < 1, or where num_correct is no such number. Source: Chen et al. 2021,
    arXiv 2107.03374."""
    if not 1 <= N <= num_samples:
        raise ValueError(f"pass@{N} cannot be estimated from {num_samples} samples: draw at least N")
    num_correct = torch.as_tensor(num_correct).cpu()
    if ((num_correct < 0) | (num_correct > num_samples) | (num_correct != num_correct.long())).any():
        raise ValueError(f"num_correct counts right samples: a whole number, 0 to {num_samples}")
    j = torch.arange(num_samples, dtype=torch.float64)
    factors = (1 - N / (num_samples - j)).clamp(min=0)
    all_fail = torch.cat([torch.ones(1, dtype=torch.float64), factors.cumprod(dim=0)])  # indexed by c: C(n - c, N) / C(n, N)
    return 1 - all_fail[num_correct.long()]


# ==== 2. The loss =========================================================================================
#
# Cross-entropy, -log p, asks that the first try be right. With N tries, ask that any of them be right: minus the logarithm
# of pass@N. That is the whole idea. What it changes shows in the gradient:
#
#     d/dθ [-log(1 - (1 - p)^N)] = F(N, p) · d/dθ [-log p],      F(N, p) = N p (1 - p)^(N-1) / (1 - (1 - p)^N)
#
# This is the chain rule, with dp = p · d log p. Where p is small, (1 - p)^N is e^(-N p), and F depends on u = N p alone, the
# number of right answers to expect among N: F ≈ u / (e^u - 1). While p is far below 1/N, F is 1, and the example pulls as it
# does under cross-entropy. Around 1/N the pull fades: F is 0.58 at p = 1/N, 0.16 at 3/N, 0.03 at 5/N. So an example that N
# tries solve hardly pulls, and the model grows little surer of it: the loss limits confidence. With N = 1, F is 1 for every
# p: that is cross-entropy.


def dco_loss(log_p, N):
    """The limited loss (Direct Coverage Optimization): L_N = -log(1 - (1 - p)^N) of each example, in nats.

    log_p: (B,) log-probabilities of the right answers, each the sum over the answer's tokens; N: a number, or (B,) one for
    each example. Returns (B,), in the dtype of log_p: take the mean and call backward. Autograd supplies F. The relative
    error is below 1e-5 in float32 and 1e-12 in float64, and the gradient finite, for N from 1 to 1,000,000 and log_p from 0
    to -2000, where p itself has long underflowed. Raises ValueError for N < 1, and for log_p > 0, which is no
    log-probability (a loss, perhaps: change its sign). Source: arXiv 2502.07154."""
    x, N, log_fail = check_log_p(log_p, N)
    loss = -log1mexp(N * log_fail)
    loss = torch.where(x < -50, -x - torch.log(N), loss)  # where p < e^-50, 1 - (1 - p)^N is N p to the last digit
    return torch.where(N == 1, -x, loss).to(log_p)


def overconfidence_factor(log_p, N):
    """F(N, p) = N p (1 - p)^(N-1) / (1 - (1 - p)^N) of each example, from 1 down to 0: the share of cross-entropy's gradient
    that the limited loss keeps, F = -d L_N / d log p. It is small where the model is surer than N tries need.

    Arguments, precision and errors as in `dco_loss`. To weight cross-entropy by F yourself, detach F."""
    x, N, log_fail = check_log_p(log_p, N)
    factor = torch.exp(torch.log(N) + x + (N - 1) * log_fail - log1mexp(N * log_fail))
    return torch.where((N == 1) | (x < -50), 1.0, factor).to(log_p)


def check_log_p(log_p, N):
    """log p, N and log(1 - p) in float64, since float32 would lose the digits of N log(1 - p)."""
    if (log_p > 1e-3).any():
        raise ValueError("log_p is a log-probability, 0 or less: is its sign lost?")
    x = (log_p.cpu() if log_p.device.type == "mps" else log_p).double()  # Apple's GPUs have no float64
    inside = torch.where(x > -1e-300, -1e-300, torch.where(x < -50, -50.0, x))  # x, but for p = 1 and p < e^-50
    return x, check_tries(N).to(x.device), log1mexp(inside)


def log1mexp(x):
    """log(1 - e^x) for x < 0, by whichever of two forms does not cancel (Mächler 2012)."""
    near_zero = x > -math.log(2)
    by_expm1 = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    by_log1p = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, by_expm1, by_log1p)


# Reinforcement learning with a verifier asks for something else: not the mean of log pass@N, but the mean of pass@N itself.
# With N = 1 that is the mean of p, the usual reward. The difference is what happens to hard examples. The mean of -log
# never gives an example up, however small its p. Under the mean of pass@N an example pulls in proportion to its pass@N:
# where p is tiny, hardly at all. That wins where answers can only be guessed, and gives up what could still be learned
# (exercise 5). The disease is the same: with N = 1 the mean of p, too, makes a model overconfident.


def reward_loss(log_p, N):
    """-log of the batch's mean pass@N. Reinforcement learning for pass@N climbs this mean, by estimates; here its gradient
    is exact.

    log_p: (B,); N as in `dco_loss`. Returns a scalar, in log space throughout, so as precise and finite as `dco_loss`.
    Raises ValueError as `dco_loss` does, and for an empty batch, which has no mean."""
    if len(log_p) == 0:
        raise ValueError("an empty batch has no mean pass@N")
    return math.log(len(log_p)) - torch.logsumexp(-dco_loss(log_p, N), dim=0)


def pass_at_n_weights(num_samples, num_correct, N):
    """The weight of each right try in an unbiased estimate of the gradient of pass@N, from n tries of which c are right:

        ∇ pass@N ≈ Σ_right w ∇ log π(try),      w = N/n · C(n - c, N - 1) / C(n - 1, N - 1).

    w is N/n times the unbiased estimate of (1 - p)^(N-1), the chance that N - 1 other tries all fail: the idea of F once
    more. A wrong try weighs 0, and no baseline need be subtracted. With N = 1, w = 1/n: plain REINFORCE.
    Arguments, shapes and errors as in `estimate_pass_at_n`. Source: Walder and Karkhanis 2025, arXiv 2505.15201."""
    num_correct = torch.as_tensor(num_correct).cpu()
    estimate_pass_at_n(num_samples, num_correct, N)  # for its errors
    others_solve = estimate_pass_at_n(num_samples - 1, (num_correct - 1).clamp(min=0), N - 1) if N > 1 else 0
    return (num_correct > 0).double() * N / num_samples * (1 - others_solve)


LOSSES = {  # from the batch's log_p (B,) and N to the number that is minimized
    "ce": lambda log_p, N: -log_p.mean(),
    "limited": lambda log_p, N: dco_loss(log_p, N).mean(),
    "reward": reward_loss,
}

# ==== 3. A small GPT ======================================================================================
#
# The usual decoder: token and position embeddings, blocks of attention and MLP, logits for the next token. Attention is
# written out, to be read; for the shortest texts that is no slower than PyTorch's own. Three things save time and change
# no number. `last`: where only the last few logits are wanted (the answer's), the last block computes only those. `cache`:
# sampling keeps the keys and values of past positions instead of computing them anew. And it reads equal prompts once.


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

    def forward(self, x, mask, cache=None):
        """x (B, T, C) -> (B, Q, C), its last Q positions. Each looks at those of K where mask (Q, K) is 0, not -inf."""
        def heads(t):  # (B, ·, C) -> (B, heads, ·, C / heads)
            return t.view(B, -1, self.n_head, C // self.n_head).transpose(1, 2)

        B, T, C = x.shape
        Q, K = mask.shape
        normed = self.ln_1(x)
        q = heads(self.query(normed[:, -Q:]))
        k, v = map(heads, self.key_value(normed).split(C, dim=-1))
        if cache is not None:  # keys and values (B, heads, ·, ·); those of the K - T positions before x are in it already
            keys, values = cache
            keys[:, :, K - T:K], values[:, :, K - T:K] = k, v
            k, v = keys[:, :, :K], values[:, :, :K]
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        attended = (scores + mask).softmax(dim=-1) @ v
        x = x[:, -Q:] + self.projection(attended.transpose(1, 2).reshape(B, Q, C))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_layer=2, n_head=4, n_embd=128):
        super().__init__()
        self.n_head, self.n_embd = n_head, n_embd
        self.token_embedding = nn.Embedding(vocab_size, n_embd)
        self.position_embedding = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        self.register_buffer("causal", torch.full((block_size, block_size), -torch.inf).triu(1), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.03)  # a little more than GPT-2's, for a smaller model
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, last=None, cache=None, start=0):
        """tokens (B, T) int64 -> logits (B, T, vocab_size), or (B, last, vocab_size). With a cache, the tokens stand
        at positions start … start + T - 1, after those that are in it."""
        end = start + tokens.shape[1]
        x = self.token_embedding(tokens) + self.position_embedding.weight[start:end]
        for i, block in enumerate(self.blocks):
            first = end - last if last and block is self.blocks[-1] else start  # the first position still wanted
            x = block(x, self.causal[first:end, :end], None if cache is None else cache[i])
        return self.head(self.ln(x))


@torch.no_grad()
def sample(model, prompts, num_new_tokens, temperature=1.0, generator=None):
    """Continue prompts (B, T) by sampling each next token from softmax(logits / temperature), greedily at
    temperature 0. Returns the (B, num_new_tokens) new tokens."""
    chunk = 1024 if prompts.device.type == "cpu" else 16384  # on a CPU a larger cache is slower
    if len(prompts) > chunk:
        chunks = [sample(model, some, num_new_tokens, temperature, generator) for some in prompts.split(chunk)]
        return torch.cat(chunks)
    T, device = prompts.shape[1], prompts.device
    tokens, place = prompts.cpu().unique(dim=0, return_inverse=True)  # each distinct prompt is read once
    size = 2, len(tokens), model.n_head, T + num_new_tokens, model.n_embd // model.n_head  # 2: keys and values
    cache = [torch.empty(size, device=device) for _ in model.blocks]
    logits = model(tokens.to(device), last=1, cache=cache)[place, 0]
    cache = [(keys[place], values[place].mT.contiguous().mT) for keys, values in cache]  # transposed, they are read faster
    texts = prompts
    for start in range(T, T + num_new_tokens):
        if start > T:
            logits = model(tokens, last=1, cache=cache, start=start - 1)[:, 0]
        if temperature == 0:
            tokens = logits.argmax(dim=-1, keepdim=True)
        else:
            tokens = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
        texts = torch.cat([texts, tokens], dim=1)
    return texts[:, T:]

# ==== 4. From a model to p ================================================================================
#
# Training needs log p of its examples, differentiable; measuring needs p of problems. How to get them depends on what an
# answer is. So each kind of answers is a class with two duties, `log_p` and `measure`; everything else in it has a default.
# The rest of this file knows no kind. To add one, write such a class and enter it in `KINDS`; to add a task, write a
# function and enter it in `TASKS`, and its settings in `SETTINGS`. exercises/language_model.py does all three from outside.
#
# One rule holds for every kind. Training pulls on what it is shown, be it an answer, a trace or the step of a proof. F
# depends on p, the probability that a whole try ends right, by whatever trace or proof. In a proof, say, the gradient comes
# from one step, and F from the p of the whole theorem. `with_value` joins the two: the loss sees the value, so it takes F
# from there, and backward follows the step.

EVAL_NS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # pass@N is measured for these N, and for the run's own
COLUMNS = (1, 8, 64, 512)  # figures mark these, and --frontier trains with them
TEMPERATURES = (1.0, 0.7, 1.3, 1.6, 2.0, 2.5)


class Answers:
    """Short answers, right in one form: one forward pass gives p(y|x) = Π_t p(y_t | x, y_<t), and pass@N follows for every N
    without sampling; at temperature T, too, with the logits divided by T."""
    plans = {"both": [{"loss": "ce"}, {"loss": "limited"}],  # what --loss both, --loss all and --frontier train
             "all": [{"loss": loss} for loss in LOSSES],
             "frontier": [{"loss": "ce"}, *({"loss": "limited", "N": N} for N in COLUMNS[1:])]}
    num_measured = 500  # of the training examples

    def __init__(self, task, settings, seed, device):
        self.task, self.settings, self.device = task, settings, device
        self.train_subset = torch.arange(task.size)[:self.num_measured]
        self.generator = torch.Generator(device).manual_seed(seed)
        self.eval_Ns = sorted({*EVAL_NS, settings["N"], settings["tries"]})

    def new_model(self):
        s = self.settings
        return GPT(len(self.task.vocab), self.task.length, s["n_layer"], s["n_head"], s["n_embd"])

    def new_epoch(self, model, epoch, N):
        """What must be done before an epoch, and before its measurement."""

    def log_p(self, model, batch):
        """log p of a batch (B,) of training examples, given by their indices: (B,), differentiable."""
        x, y = (tensor[batch] for tensor in self.task.train)
        return answer_log_p(answer_logits(model, x, y), y)

    def objective(self, model, batch, loss, N):
        """The number that training minimizes."""
        return LOSSES[loss](self.log_p(model, batch), N)

    def problems(self, split):
        """The prompts and answers that are measured: all test problems, or some training problems."""
        return self.task.test if split == "test" else [tensor[self.train_subset] for tensor in self.task.train]

    def measure(self, model, split, temperatures):
        """{temperature: (p, confidence, number of samples)} of the problems of a split.

        p is the probability that a sample is right, confidence that it is the model's own greedy answer, right or wrong:
        (P,) float64 on the CPU. Where both are exact, the number of samples is None; else they are shares of it."""
        x, y = self.problems(split)
        greedy = mask_after_end(sample(model, x, y.shape[1], temperature=0))
        logits, greedy_logits = answer_logits(model, x, y), answer_logits(model, x, greedy)
        result = {}
        for T in temperatures:
            log_ps = answer_log_p(logits, y, T), answer_log_p(greedy_logits, greedy, T)
            result[T] = *(log_p.double().exp().cpu() for log_p in log_ps), None
        return result

    def baselines(self):
        """{name: N -> pass@N} of baselines that never see the question. Here they are guessers: they know how often each
        answer is right in training, p, and sample from a policy."""
        if self.task.answer_frequencies is None:
            return {}
        policies = {"guess by frequency": lambda p, N: p, "guess as limited tends": limited_policy,
                    "guess optimally": optimal_policy}
        return {name: partial(guess_pass_at_n, self.task, policy) for name, policy in policies.items()}

    def show_tries(self, model, num_tries):
        """What tries at the first three test problems give: [(problem, number of right tries, tries as text), …]."""
        x, y = (tensor[:3] for tensor in self.task.test)
        generator = torch.Generator(x.device).manual_seed(0)
        tries = sample_traces(model, x, y, num_tries, 1.0, generator)
        return self.task.as_text(mask_after_end(tries))


def answer_logits(model, prompts, answers):
    """The logits (B, A, vocab_size) that predict the tokens of answers (B, A), each with the right ones before it."""
    texts = torch.cat([prompts, answers[:, :-1]], dim=1)
    return torch.cat([model(some, last=answers.shape[1]) for some in texts.split(1000)])


def answer_log_p(logits, answers, temperature=1.0, ignore_index=PAD):
    """log p(y|x) = Σ_t log p(y_t | x, y_<t): (B,), from `answer_logits`. Padding after the answer is ignored."""
    logits = logits if temperature == 1 else logits / temperature
    losses = cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=ignore_index, reduction="none")
    return -losses.view(answers.shape).sum(dim=1)


def guess_pass_at_n(task, policy, N):
    """The test set's pass@N of a guesser who samples from policy(p, N), p the answers' frequencies in training."""
    q = torch.as_tensor(policy(task.answer_frequencies.numpy(), N))
    index = task.test_answer_index
    return pass_at_n(torch.where(index >= 0, q[index], 0.0), N).mean().item()


def with_value(log_p, value):
    """A tensor with log_p's gradient and another value."""
    return value.detach().to(log_p) + (log_p - log_p.detach())


class Traces(Answers):
    """Reasoning first, then the answer, the last `answer_length` tokens, which alone count. So p sums over all traces, too
    many to enumerate. In the test, n traces are sampled, c of them are right, and pass@N is estimated.

    Training knows p(the given trace) exactly, from its own forward pass. It adds the share of sampled traces that are right
    and differ from the given one: `num_traces` for each training problem, anew every `resample_every` epochs."""
    num_measured = 100
    num_samples = {1.0: 128, 1.3: 64}  # of each test problem, at each temperature

    def __init__(self, task, settings, seed, device):
        super().__init__(task, settings, seed, device)
        self.other_share = torch.zeros(task.size, device=device)

    def new_epoch(self, model, epoch, N):
        if N > 1 and epoch % self.settings["resample_every"] == 0:
            x, y = self.task.train
            traces = sample_traces(model, x, y, self.settings["num_traces"], 1.0, self.generator)
            is_given = (traces == y[:, None]).all(dim=2)
            self.other_share = (self.same_answer(traces, y) & ~is_given).float().mean(dim=1)

    def log_p(self, model, batch):
        given, others = super().log_p(model, batch), self.other_share[batch]
        p = (given.exp() + others).clamp(max=1)
        return with_value(given, torch.where(others > 0, p.log(), given))

    def measure(self, model, split, temperatures):
        x, y = self.problems(split)
        greedy = sample(model, x, y.shape[1], temperature=0)
        generator = torch.Generator(x.device).manual_seed(0)  # the same random numbers for every model
        result = {}
        for T in [T for T in temperatures if T in self.num_samples]:
            traces = sample_traces(model, x, y, self.num_samples[T], T, generator)
            matches = self.same_answer(traces, y), self.same_answer(traces, greedy)
            p, confidence = (match.double().mean(dim=1).cpu() for match in matches)
            result[T] = p, confidence, self.num_samples[T]
        return result

    def same_answer(self, traces, trace):
        """Which of the traces (P, number, A) end in the same answer as one trace (P, A) does: (P, number)."""
        return (self.task.final(traces) == self.task.final(trace)[:, None]).all(dim=2)


def sample_traces(model, x, y, number, temperature, generator):
    """(P, number, A) traces for the prompts x (P, T), as long as y (P, A)."""
    traces = sample(model, x.repeat_interleave(number, dim=0), y.shape[1], temperature, generator)
    return traces.view(len(x), number, -1)


# A theorem has few states that an attempt at it can come to. toy_tasks.py keeps them in a table, a row each: the state as a
# prompt, the tactics that apply, and the rows that each of these leaves to prove. From the probability of every tactic in
# every row, the policy, `proof_p` computes p.


class Searches(Answers):
    """Whole attempts at theorems, judged by the kernel; no proof is shown. p, that an attempt succeeds, is exact and
    differentiable, by dynamic programming, and N counts attempts. The greedy attempt takes the likeliest tactic in every
    state. The confidence is the probability of all its choices, whether they prove the theorem or not.

    This is reinforcement learning with a verifier. With N = 1 the reward loss is the usual reward, p; a larger N is compared
    with it. Here the gradient is exact. With `reinforce` it is estimated, from that many attempts at each theorem."""
    plans = Answers.plans | {"both": [{"loss": "reward", "N": 1}, {"loss": "reward"}],
                             "frontier": [{"loss": "reward", "N": N} for N in COLUMNS]}

    def __init__(self, task, settings, seed, device):
        super().__init__(task, settings, seed, device)
        self.all_theorems = torch.arange(len(task.train.theorems))
        self.generator = torch.Generator().manual_seed(seed)  # attempts are walked through on the CPU

    def log_p(self, model, batch):
        table = part_of(self.task.train, batch)
        return proof_p(tactic_logits(model, table).softmax(dim=1), table).clamp(min=1e-300).log()

    def objective(self, model, batch, loss, N):
        num_attempts = self.settings.get("reinforce")
        if not num_attempts:
            return super().objective(model, batch, loss, N)
        if loss != "reward":
            raise ValueError(f"--reinforce estimates the gradient of --loss reward, not of {loss}")
        table = part_of(self.task.train, batch)
        log_policy = tactic_logits(model, table).log_softmax(dim=1)
        is_proved, log_pi = sample_attempts(log_policy, table, num_attempts, self.generator)
        weights = pass_at_n_weights(num_attempts, is_proved.sum(dim=1), N)
        return -(weights[:, None] * is_proved * log_pi).sum(dim=1).mean()

    def measure(self, model, split, temperatures):
        table = self.task.test if split == "test" else part_of(self.task.train, self.all_theorems[:100])
        logits, result = tactic_logits(model, table), {}
        for T in temperatures:
            policy = (logits / T).softmax(dim=1)
            greedy = policy * one_hot(policy.argmax(dim=1), policy.shape[1])
            result[T] = proof_p(policy, table), proof_p(greedy, table, failure=1.0), None  # also where it fails
        return result

    def baselines(self):
        return {"blind search": lambda N: pass_at_n(self.task.test.blind, N).mean().item()}

    def show_tries(self, model, num_tries):
        policy = tactic_logits(model, self.task.test).softmax(dim=1)
        return show_attempts(policy, self.task.test, num_tries, torch.Generator().manual_seed(0))


class Steps(Searches):
    """Imitation of a known proof, step by step: an example is a state of it and the tactic used there. F takes the p of an
    attempt at the whole theorem, by whatever proof: exact, and computed anew every epoch.

    With `per_step`, the paper's step-wise loss: p is the step's own, and N counts tries at one step."""
    plans = Answers.plans | {
        "frontier": Answers.plans["frontier"] + [{"loss": "limited", "N": N, "per_step": True} for N in (2, 4, 8)]}
    num_measured = 1_000_000  # all
    theorem_log_p = None

    def new_epoch(self, model, epoch, N):
        if N > 1 and not self.settings["per_step"]:
            with torch.no_grad():
                self.theorem_log_p = super().log_p(model, self.all_theorems)

    def log_p(self, model, batch):
        theorem, row, tactic = self.task.steps[batch].unbind(dim=1)
        if self.theorem_log_p is not None and not torch.is_grad_enabled():  # then only the value is wanted
            return self.theorem_log_p[theorem]
        step = -cross_entropy(tactic_logits(model, self.task.train, row), tactic, reduction="none")
        return step if self.theorem_log_p is None else with_value(step, self.theorem_log_p[theorem])


def tactic_logits(model, table, rows=slice(None)):
    """The tactics' logits in the states of a `ProofTable`: (S, vocab_size), float64, -inf where one does not apply."""
    prompts = table.prompts[rows].to(model.head.weight.device)
    logits = torch.cat([model(x, last=1)[:, 0] for x in prompts.split(250)])
    return logits.cpu().double().masked_fill(~table.applicable[rows], -torch.inf)


KINDS = {"answers": Answers, "traces": Traces, "searches": Searches, "steps": Steps}

# ==== 5. Training =========================================================================================
#
# One loop for every loss and kind, and the same settings for every loss. Each is a flag, as in --learning-rate 3e-3.
#
# F gets small, but never zero, and Adam divides a gradient by its own recent size: when all gradients are small, it makes
# full-size steps of them, and p drifts on. Two things hold it back. Adam's `eps`, far above the usual 1e-8, leaves small
# gradients small. And training passes over an example that N tries already solve (F < 0.1: p beyond about 4/N), as the
# paper's own code does: those that still pull wait until they fill a batch, and only then is an update made. On multiply,
# training p ends near 5/N, since updates for other examples carry it a little further.

DEFAULTS = {
    "N": 64,  # tries that the loss trains for
    "tries": 64,  # tries that tables and figures show
    "epochs": 100,
    "evaluations": 10,  # how often to measure, roughly; equally far apart
    "batch_size": 50,
    "learning_rate": 3e-3,  # at its peak
    "weight_decay": 0.0,
    "eps": 1e-3,  # Adam's
    "pass_over": 0.1,  # the limited loss passes over examples with F(N, p) below this; 0: over none
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,  # the width
}
SETTINGS = {
    "multiply": DEFAULTS | {"batch_size": 100, "learning_rate": 2e-3},
    "cot": DEFAULTS | {"epochs": 80, "evaluations": 8, "num_traces": 32, "resample_every": 2},
    "prove": DEFAULTS | {"epochs": 40, "per_step": False},
    "search": DEFAULTS | {"epochs": 8, "evaluations": 8, "batch_size": 10, "reinforce": 0},
    "math": DEFAULTS | {"epochs": 8, "evaluations": 8, "learning_rate": 2e-3, "n_embd": 128, "math_dir": ""},
}


def train(task, loss="limited", N=None, seed=0, device="cpu", out=None, place=0, **changes):
    """Train a new model on a task, and measure it as it learns. Returns the run, a dictionary (see the README), and the
    model. `changes` are to the task's `SETTINGS`: epochs=10. Cross-entropy is trained with N = 1, whatever is given.

    Into the folder `out`, if given, the run is saved: as *.partial after every evaluation, as *.json at the end. `place` is
    the line of its progress bar. Raises FloatingPointError where training diverges."""
    settings = SETTINGS[task.name] | changes
    settings["N"] = N or settings["N"]
    train_N = 1 if loss == "ce" else settings["N"]
    torch.manual_seed(seed)  # the same first weights and the same order of examples for every loss
    order = torch.Generator().manual_seed(seed)
    kind = KINDS[task.kind](task.to(device), settings, seed, device)
    model = kind.new_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), eps=settings["eps"],
                                  weight_decay=settings["weight_decay"], fused=True)
    epochs, batch_size = settings["epochs"], settings["batch_size"]
    num_batches = math.ceil(task.size / batch_size)
    run = new_run(kind, loss, train_N, seed)
    name = f"{run['label']}, seed {seed}"
    waiting, updates, start = torch.empty(0, dtype=torch.long), 0, time.perf_counter()

    with tqdm(None, name, epochs * num_batches, leave=False, position=place, disable=sys.stderr is None) as bar:
        for epoch in range(epochs + 1):
            kind.new_epoch(model, epoch, train_N)
            if epoch in evaluated_epochs(settings):
                record = {"epoch": epoch, "updates": updates} | evaluate(run, kind, model, loss, train_N)
                record["seconds"] = round(time.perf_counter() - start, 2)
                run["history"].append(record)
                save(run, out, finished=epoch == epochs)
                bar.set_postfix_str(f"loss {record['loss']:.2f}, {updates} updates")
            if epoch == epochs:
                return run, model
            for i, candidates in enumerate(torch.randperm(task.size, generator=order).split(batch_size)):
                for group in optimizer.param_groups:
                    group["lr"] = settings["learning_rate"] * schedule((epoch + i / num_batches) / epochs)
                waiting = torch.cat([waiting, still_pulling(kind, model, candidates, loss, train_N)])
                if len(waiting) >= len(candidates):  # a full batch; an epoch's last is smaller
                    batch, waiting = waiting[:batch_size], waiting[batch_size:]
                    optimizer.zero_grad()
                    kind.objective(model, batch, loss, train_N).backward()
                    optimizer.step()
                    updates += 1
                bar.update()


def schedule(progress):
    """The learning rate's share of its peak: up over the first 5 % of training, then a cosine down to a tenth."""
    warm_up = min(1, 0.01 + progress / 0.05)
    return warm_up * (0.55 + 0.45 * math.cos(math.pi * progress))


@torch.no_grad()
def still_pulling(kind, model, batch, loss, N):
    """Those examples of a batch that N tries do not solve yet: F(N, p) >= `pass_over`. The others are passed over."""
    threshold = kind.settings["pass_over"]
    if loss != "limited" or N == 1 or threshold == 0:
        return batch
    factor = overconfidence_factor(kind.log_p(model, batch), N)
    return batch[factor.cpu() >= threshold]


def evaluated_epochs(settings):
    interval = math.ceil(settings["epochs"] / settings["evaluations"])
    return [*range(0, settings["epochs"], interval or 1), settings["epochs"]]


@torch.no_grad()
def evaluate(run, kind, model, loss, N):
    """Measure the model: what a record of the run's history holds. The run itself gets p and confidence of every test
    problem, now and in the best epoch so far, and tries at the first three."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise FloatingPointError("diverged: try a smaller --learning-rate or --weight-decay")
    loss_value = LOSSES[loss](kind.log_p(model, kind.train_subset), N).item()
    measured = kind.measure(model, "test", TEMPERATURES)
    by_temperature = {f"{T:g}": means(*measured[T], kind.eval_Ns) for T in measured}
    test, goal = by_temperature["1"], f"pass@{kind.settings['tries']}"
    train = means(*kind.measure(model, "train", [1.0])[1.0], kind.eval_Ns)
    if goal not in test:
        raise ValueError(f"{goal} cannot be estimated from so few samples: give fewer --tries")
    p, confidence, _ = measured[1.0]
    problems = {"p": p.tolist(), "confidence": confidence.tolist()}
    best_before = max((record["test"][goal] for record in run["history"]), default=0)
    if test[goal] >= best_before:
        run["problems"]["best"] = problems
    run["problems"] |= problems
    run["example"] = kind.show_tries(model, 64)
    return {"loss": loss_value, "test": test, "train": train, "tempered": by_temperature}


def means(p, confidence, num_samples, eval_Ns):
    """{"pass@1": …, "confidence": …, "log_p": …}: means over problems, from what `measure` gives for one temperature. With
    samples there is no log p, and no pass@N for more tries than samples."""
    if num_samples:
        num_right = (p * num_samples).round()
        values = {f"pass@{n}": estimate_pass_at_n(num_samples, num_right, n) for n in eval_Ns if n <= num_samples}
    else:
        values = {f"pass@{n}": pass_at_n(p, n) for n in eval_Ns} | {"log_p": p.clamp(min=1e-300).log()}
    values["confidence"] = confidence
    return {name: value.mean().item() for name, value in values.items()}


def new_run(kind, loss, N, seed):
    """An empty run. Its label and the name of its file are made here, once."""
    task, settings, usual = kind.task, kind.settings, SETTINGS[kind.task.name]
    changes = [f"{name}={value}" for name, value in settings.items()  # texts are paths: `data` names the data set
               if value != usual.get(name) and name not in ("N", "tries") and not isinstance(value, str)]
    loss_name = "cross-entropy" if loss == "ce" else f"{loss} N={N}"
    label = ", ".join([loss_name, *changes])
    data = [f"data={task.data}"] * bool(task.data)
    file = "-".join([task.name, loss, f"N{N}", *data, *changes, f"seed{seed}"])
    config = settings | {"N": N, "device": kind.device, "data": task.data}
    features = {name: values.tolist() for name, values in task.features.items()}
    rivals = {name: {f"pass@{n}": baseline(n) for n in kind.eval_Ns} for name, baseline in kind.baselines().items()}
    return dict(task=task.name, loss=loss, N=N, seed=seed, label=label, file=file, config=config,
                history=[], problems=features, rivals=rivals)


def save(run, out, finished):
    """Write a run as JSON, whole or not at all: to a new file, which then takes the old one's name. An unfinished run is
    *.partial, of a name that no other process writes."""
    if out is None:
        return
    Path(out).mkdir(parents=True, exist_ok=True)
    path = Path(out) / f"{run['file']}-{os.getpid()}.partial"
    new = path.with_suffix(".new")
    try:
        new.write_text(json.dumps(run), encoding="utf-8")
    except OSError:  # a full disk
        new.unlink(missing_ok=True)
        raise
    new.replace(path)
    if finished:
        path.replace(Path(out) / f"{run['file']}.json")

# ==== 6. Theory ===========================================================================================
#
# Why does each loss do what it does? Where a question has one answer that can be learned, cross-entropy learns it by heart,
# to p = 1, and the limited loss's pull fades around 1/N. Where the answer stays uncertain, the losses' optima differ. To see
# that, take the network away. Let there be many questions alike, whose text tells nothing: answer i is right in a share p_i
# of them. (In this section, then, p belongs to the questions, and q is what the model gives each answer.) A policy q
# reaches pass@N = Σ_i p_i (1 - (1 - q_i)^N). Which q is best, and where does each loss lead? Cross-entropy is least where
# q = p, whatever N is.


def optimal_policy(p, N):
    """The policy q that maximizes pass@N = Σ_i p_i (1 - (1 - q_i)^N) over Σ_i q_i = 1. The reward loss tends to it, since
    it is -log of this sum.

    For an answer that is kept, the Lagrangian's derivative is zero, N p_i (1 - q_i)^(N-1) = N λ. The others get nothing:
        q_i = max(0, 1 - (λ / p_i)^(1/(N-1))),
    water-filling: the larger N, the flatter. With N = 1 all of q is on the likeliest answer; if several are, they share it
    equally.
    p: (K,) numbers from 0 on, not all 0 (their scale does not matter). Returns (K,), float64 numpy, sum 1. Raises
    ValueError for any other p, and for N < 1."""
    p = check_answers(p, N)
    if N == 1:
        best = p == p.max()
        return best / best.sum()

    def policy(x):  # x: -log λ
        return -np.expm1(np.minimum(0, -(x + log_p) / (N - 1)))

    with np.errstate(divide="ignore"):
        log_p = np.log(p)
    return with_sum_1(policy, -log_p.max(), 40 * (N - 1) - log_p.max())  # at the ends all q are 0, and one is 1


def limited_policy(p, N):
    """The policy q that minimizes the limited loss, Σ_i p_i L_N(q_i) over Σ_i q_i = 1: where that loss tends.

    The derivative of the Lagrangian is zero where, for every i,
        N p_i (1 - q_i)^(N-1) / (1 - (1 - q_i)^N) = λ,    that is    p_i F(N, q_i) / q_i = λ.
    Where q_i ≪ 1/N, F is 1 and q_i = p_i / λ, in proportion, as cross-entropy has it (for N = 1 everywhere: q = p). Beyond
    1/N, q_i is held back. The logarithm gives no possible answer up.
    p: (K,) numbers from 0 on, not all 0. Returns (K,), float64 numpy, sum 1 within 1e-9. Raises ValueError as above."""
    p = check_answers(p, N)
    if N == 1:
        return p / p.sum()
    log_ratio = np.log(p[p > 0]) - np.log(p.max())

    # With v = -N log(1 - q), the equation's logarithm is (1 - 1/N) v + log(1 - e^(-v)) = log(N p / λ). The left side is
    # concave and grows with v, so Newton's method finds v for a given λ, and bisection finds λ.
    def policy(s):  # s: log(N p / λ) of the likeliest answer
        target = s + log_ratio
        v = np.logaddexp(0, target)  # the solution for N → ∞, never too large
        for _ in range(8):
            left = (1 - 1 / N) * v + np.log(-np.expm1(-v))
            slope = 1 - 1 / N + np.exp(-v) / -np.expm1(-v)
            v += (target - left) / slope
        return -np.expm1(-v / N)

    low = math.log(-math.expm1(-N / len(log_ratio))) - 1  # here all q are below 1/K
    q = np.zeros_like(p)
    q[p > 0] = with_sum_1(policy, low, 40.0 * N)
    return q


def with_sum_1(policy, low, high):
    """policy(x) for the x between low and high at which it sums to 1, by bisection; the sum grows with x."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if policy(middle).sum() < 1 else (low, middle)
    return policy(high)


def check_answers(p, N):
    p = np.asarray(p, dtype=np.float64)
    check_tries(N)
    if p.ndim != 1 or not np.isfinite(p).all() or (p < 0).any() or not p.any():
        raise ValueError("p is a row of numbers from 0 on, not all 0")
    return p


def confident_pass_at_n(c, N, a, K):
    """The one-parameter picture. A model puts probability c, its confidence, on its favourite answer, which is right with
    probability a, and spreads the rest evenly over the K - 1 others:
        pass@N(c) = a (1 - (1 - c)^N) + (1 - a) (1 - (1 - (1 - c) / (K - 1))^N).
    At c = 1 that is a for every N: no amount of sampling helps. c: a number or an array."""
    other = (1 - torch.as_tensor(c)) / (K - 1)
    return a * pass_at_n(c, N) + (1 - a) * pass_at_n(other, N)


# ==== 7. Tables and figures ===============================================================================
#
# All from the saved runs. Nothing here is needed to understand the rest.

COLORS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # for the colour-blind (Okabe, Ito)
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "savefig.dpi": 110}


def load_runs(out, task_name, data, N):
    """The task's finished runs in a folder, on one data set: a list of rows, each a list of runs that differ in the seed
    only, with their numbers as arrays. A file with anything wrong is named and left out."""
    rows = defaultdict(list)
    for path in sorted(Path(out).glob(f"{task_name}-*.json")):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            if (run["task"], run["config"]["data"]) == (task_name, data):
                run |= arrays_of(run, N)
                settings = [item for item in run["config"].items() if item[0] != "tries" and not isinstance(item[1], str)]
                place = run["loss"] != "ce", run["loss"], run["N"], run["label"]  # cross-entropy first
                rows[*place, repr(settings), run["pass_at"].shape].append(run)
        except Exception as error:  # whatever it is, the other runs must not suffer
            print(f"left out {path}, which is no run of this version ({error!r}); remove it", file=sys.stderr)
    return [rows[key] for key in sorted(rows)]


def arrays_of(run, N):
    """A run's numbers as arrays: "pass_at" (epochs, temperatures, N), for `EVAL_NS` and at last N, nan where not measured,
    the first temperature 1; "confidence" and "train p" (epochs,); and "baselines" (·, N)."""
    def pass_at(values):
        return [values.get(f"pass@{n}", math.nan) for n in (*EVAL_NS, N)]

    history = run["history"]
    if [record["epoch"] for record in history] != evaluated_epochs(run["config"]):
        raise ValueError("its epochs are not those of its settings")
    arrays = {"pass_at": [[*map(pass_at, record["tempered"].values())] for record in history],
              "confidence": [record["test"]["confidence"] for record in history],
              "train p": [record["train"]["pass@1"] for record in history],
              "baselines": [*map(pass_at, run["rivals"].values())]}
    return {name: np.array(values, dtype=np.float64) for name, values in arrays.items()}


def stack(row, name):
    return np.stack([run[name] for run in row])


def best(pass_at):
    """pass@N of each seed in its best epoch and at the best of the given temperatures, from (seeds, epochs, temperatures, N)
    for the last N. These are chosen on the test set itself, which flatters them."""
    return np.fmax.reduce(pass_at[..., -1], axis=(1, 2))


def mean_and_error(values):
    """Mean and standard error over the first axis, the seeds; an error of 0 where there is only one."""
    deviation = np.std(values, axis=0, ddof=len(values) > 1)
    return np.mean(values, axis=0), deviation / math.sqrt(len(values))


def print_table(rows, N):
    """A line for each loss and its settings, at the end of training, and for the baselines: mean over the seeds ± standard
    error. In the last two columns stands pass@N in the best epoch, and at the best temperature too."""
    shown, lines = sorted({1, 8, N}), []
    at = [(*EVAL_NS, N).index(n) for n in shown]
    for row in rows:
        pass_at, confidence = stack(row, "pass_at"), stack(row, "confidence")[:, -1]
        values = pass_at[:, -1, 0, at], confidence, best(pass_at[:, :, :1]), best(pass_at)
        lines.append((row[0]["label"], np.column_stack(values)))
    most = max(rows, key=len)
    lines += [(name, stack(most, "baselines")[:, i, at]) for i, name in enumerate(most[0]["rivals"])]
    width = max(len(label) for label, _ in lines)
    headers = [*(f"pass@{n}" for n in shown), "confidence", f"best@{N}", "& best T"]
    print(" " * width + " seeds" + "".join(f"{header:>11}" for header in headers))
    for label, values in lines:
        cells = [f"{mean:.3f}±{error:.3f}".replace("0.", ".") if len(values) > 1 else f"{mean:.3f}"
                 for mean, error in zip(*mean_and_error(values))]
        print(f"{label:{width}}{len(values):6}" + "".join(f"{cell:>11}" for cell in cells))


def print_tries(rows):
    """What 64 tries at the first three test problems gave under each loss: overconfidence to the naked eye."""
    print("64 tries at the first three test problems:")
    runs = [run for row in rows for run in row if run["seed"] == rows[0][0]["seed"]]
    for same_problem in zip(*(run["example"] for run in runs)):
        print(same_problem[0][0])
        for run, (_, num_right, tries) in zip(runs, same_problem):
            commonest = ", ".join(f"{count} × {text}" for text, count in Counter(tries).most_common(4))
            print(f"  {run['label']}: {num_right} right; {commonest}")


def draw(rows, N, path):
    """The main figure: what each loss does to pass@1, pass@N and confidence as training goes on, and pass@N at its end."""
    figure = new_figure((11, 8.5))
    (pass_1, pass_N), (confidence, tries) = figure.subplots(2, 2)
    for row, color in zip(rows, COLORS * len(rows)):
        epochs, pass_at = evaluated_epochs(row[0]["config"]), stack(row, "pass_at")
        plot_runs(pass_1, epochs, pass_at[:, :, 0, 0], color, label=row[0]["label"])
        plot_runs(pass_N, epochs, pass_at[:, :, 0, -1], color)
        plot_runs(confidence, epochs, stack(row, "confidence"), color)
        plot_runs(confidence, epochs, stack(row, "train p"), color, linestyle="--")
        plot_runs(tries, EVAL_NS, pass_at[:, -1, 0, :-1], color)
    pass_at, label = stack(rows[0], "pass_at"), rows[0][0]["label"]
    pass_N.axhline(best(pass_at[:, :, :1]).mean(), color=COLORS[0], linestyle="--", label=f"{label}: best epoch")
    pass_N.axhline(best(pass_at).mean(), color=COLORS[0], linestyle=":", label=f"{label}: best epoch and temperature")
    most = max(rows, key=len)
    baselines = stack(most, "baselines").mean(axis=0)
    for name, values, linestyle in zip(most[0]["rivals"], baselines, (":", "--", "-.")):
        tries.plot(EVAL_NS, values[:-1], color="grey", linestyle=linestyle, label=name)
    confidence.axhline(1 / N, color="grey", linewidth=1)
    confidence.text(epochs[-1], 0.9 / N, f"1/N = 1/{N}", color="grey", ha="right", va="top")
    for axis in (pass_1, pass_N, confidence):
        axis.set(xlabel="epoch", ylabel="share of test problems")
    pass_1.set(title="pass@1", ylim=(0, None))
    pass_N.set(title=f"pass@{N}", ylim=(0, 1))
    confidence.set(title="confidence in the test, and p in training (dashed)", ylabel="probability",
                   yscale="log", ylim=(1e-3, 1.2))
    tries.set(title="pass@N at the end", xlabel="tries N", ylabel="share of test problems", ylim=(0, 1), xscale="log")
    tries.set_xticks(COLUMNS, COLUMNS)
    tries.minorticks_off()
    figure.legend(loc="outside upper center", ncols=2)
    figure.supxlabel("lines: mean over the seeds; bands: ± one standard error", fontsize="medium")
    save_and_show(figure, path)


def new_figure(size):
    import matplotlib.figure  # here, since it takes a while
    matplotlib.rcParams.update(STYLE)
    return matplotlib.figure.Figure(figsize=size, layout="constrained")


def plot_runs(axis, xs, values, color, **style):
    """The mean of values (seeds, xs) with a band of one standard error."""
    mean, error = mean_and_error(values)
    axis.plot(xs, mean, color=color, **style)
    axis.fill_between(xs, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)


def draw_theory(N, path):
    """The theory in three panels, in the order of the argument."""
    figure = new_figure((15, 4.6))
    factor, policies, confidence = figure.subplots(1, 3)
    x, a, K = np.logspace(-5, -0.001, 400), 0.1, 500
    c = np.geomspace(1 / K, 1 - 1e-9, 1000)
    for n, color in zip(COLUMNS, COLORS):
        factor.plot(x, overconfidence_factor(torch.tensor(x).log(), n), color=color, label=f"N = {n}")
        factor.axvline(1 / n, color=color, linestyle=":")
        pass_at = confident_pass_at_n(c, n, a, K)
        confidence.plot(c, pass_at, color=color, label=f"N = {n}")
        confidence.plot(c[pass_at.argmax()], pass_at.max(), "o", color=color, markeredgecolor="white")
    p = 1 / np.arange(1, 101) ** 1.2  # one uncertain question: 100 answers, the r-th likeliest with p ~ r^-1.2
    p /= p.sum()
    tends_to = {"cross-entropy: q = p": p, "limited loss": limited_policy(p, N),
                "reward loss, best for pass@N": optimal_policy(p, N)}
    for (name, q), color, linestyle in zip(tends_to.items(), COLORS, ("-", "--", "-.")):
        policies.plot(np.flatnonzero(q) + 1, q[q > 0], color=color, linestyle=linestyle, label=name)
    policies.axhline(1 / N, color="grey", linestyle=":")
    policies.text(100, 1.08 / N, f"1/N = 1/{N}", color="grey", ha="right")
    factor.set(title="(a) The pull fades beyond p = 1/N (dotted)", xscale="log",
               xlabel="p, probability that one try is right", ylabel="overconfidence factor F(N, p)")
    policies.set(title=f"(b) Where each loss tends on an uncertain question, N = {N}", xscale="log", yscale="log",
                 xlabel="answer, by rank", ylabel="probability q given to the answer")
    confidence.set(title="(c) The best confidence (dot) falls as N grows", xscale="log",
                   xlabel=f"confidence c in an answer right with probability {a}", ylabel="pass@N")
    for axis in (factor, policies, confidence):
        axis.legend()
    save_and_show(figure, path)


def save_and_show(figure, path):
    """Save a figure and say where it is; in a notebook, show it."""
    figure.savefig(path)
    print(f"Figure: {path}")
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display
        display(Image(path))


# ==== 8. Command line =====================================================================================


OPTIONS = {"task": "multiply", "loss": "both", "frontier": False, "theory": False, "seed": 0, "seeds": 1, "device": "auto",
           "out": "out"}
HELP = {"loss": "both: cross-entropy and the limited loss; for search, the reward loss with N = 1 and with N; all: every loss",
        "frontier": "train with N = 1, 8, 64 and 512", "theory": "train nothing: draw why each loss does what it does",
        "seeds": "train with that many seeds, from --seed on", "out": "the folder for runs and figures"}


def parse_arguments(argv):
    """The options and, as `settings`, all settings of the task. Refuses wrong and useless flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = fail
    devices = ["cpu", *["mps"] * torch.backends.mps.is_available(), *["cuda"] * torch.cuda.is_available()]
    choices = {"task": TASKS, "loss": ["both", "all", *LOSSES], "device": ["auto", *devices]}
    flags = {name: value for settings in SETTINGS.values() for name, value in settings.items()}
    for name, value in (OPTIONS | flags).items():
        takes = {"action": "store_true"} if value is False else {"type": type(value), "choices": choices.get(name)}
        hint = HELP.get(name, f"default {value}")
        parser.add_argument(flag_of(name), default=argparse.SUPPRESS, help=hint, **takes)
    given = vars(parser.parse_args(argv))
    args = argparse.Namespace(**OPTIONS | given)
    for name, value in given.items():
        flag = flag_of(name)
        if name in flags and name not in SETTINGS[args.task]:
            fail(f"{flag} does not fit --task {args.task}; leave it out")
        if args.theory and name not in ("theory", "N", "out") or args.frontier and name in ("loss", "N", "per_step"):
            fail(f"{flag} would be ignored beside --theory or --frontier; leave it out")
        low = 0 if isinstance(value, float) or name in ("seed", "epochs", "reinforce") else 1
        if isinstance(value, (int, float)) and not low <= value <= 1_000_000:
            fail(f"{flag} {value}: give a number from {low} to 1,000,000")
    args.settings = SETTINGS[args.task] | {name: given[name] for name in given if name in flags}
    if args.settings.get("n_embd", 0) % args.settings.get("n_head", 1):
        fail("--n-embd must be a multiple of --n-head")
    if args.device == "auto":
        args.device = devices[-1]
    return args


def flag_of(name):
    return f"--{name.replace('_', '-')}"


def fail(message):
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def jobs(args):
    """The arguments of `train` for every run, seed by seed."""
    for seed in range(args.seed, args.seed + args.seeds):
        paths = {name: value for name, value in args.settings.items() if isinstance(value, str)}
        task = TASKS[args.task](seed, **paths)
        plan = "frontier" if args.frontier else args.loss
        for place, changes in enumerate(KINDS[task.kind].plans.get(plan, [{"loss": args.loss}])):
            yield args.settings | changes | dict(task=task, seed=seed, device=args.device, out=args.out, place=place)


def run_job(job):
    """One run, on one thread. Returns it, or None where its training diverged."""
    torch.set_num_threads(1)  # more gain little for models this small, and fight with whatever else is running
    try:
        run, _ = train(**job)
    except FloatingPointError as error:
        print(f"{job['loss']} N={job['N']}, seed {job['seed']} {error}", file=sys.stderr)
        return None
    print(f"{run['history'][-1]['seconds']:.0f} s, saved in {Path(job['out'], run['file'])}.json", file=sys.stderr)
    return run


def run_side_by_side(args):
    """The runs, as they end: on a CPU as many at a time as it has cores, each in a process of its own."""
    if args.device != "cpu" or os.cpu_count() == 1 or (args.loss in LOSSES and args.seeds == 1):
        return [*map(run_job, jobs(args))]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
        try:
            return [future.result() for future in as_completed([pool.submit(run_job, job) for job in jobs(args)])]
        except BaseException:  # Ctrl-C, or a run that failed, ends all
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def report(args, run):
    """The figure and the table of all finished runs of the run's task."""
    N = args.settings["tries"]
    rows = load_runs(args.out, run["task"], run["config"]["data"], N)
    draw(rows, N, Path(args.out) / f"{run['task']}{'-frontier' * args.frontier}.png")
    print_table(rows, N)
    print_tries(rows)


def main(argv=None):
    """Train and report, or draw the theory. Returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # some consoles cannot print →
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    args = parse_arguments(argv)
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        if args.theory:
            draw_theory(args.settings["N"], Path(args.out) / "theory.png")
            return 0
        runs = run_side_by_side(args)
        if any(runs):
            report(args, next(filter(None, runs)))
        return 0 if all(runs) else 2
    except KeyboardInterrupt:
        print(f"\nInterrupted. In {args.out} are the finished runs, *.json, and what was measured of others, *.partial.",
              file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror}; what was saved before is kept")
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    status = main()
    if status == 130:  # end as Ctrl-C does, so that a shell's loop ends too
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    sys.exit(status)
