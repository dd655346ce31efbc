"""pass@N, and a loss that trains for it: cross-entropy makes a model overconfident, overconfidence wastes tries,
and one changed line in the loss mends it.

A small, complete reimplementation of Chen, Raventós, Cheng, Ganguli and Druckmann, "Rethinking Fine-Tuning when
Scaling Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning" (arXiv 2502.07154). Read it from
top to bottom, or run it:

    python passn.py                          # train with both losses and draw what happens
    python passn.py --loss limited --N 64    # one run
"""

import argparse
import functools
import json
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from toy_tasks import END, FIRST_TACTIC, MAX_DEPTH, PAD, TASKS, UNKNOWN, apply_tactic, show

# ==========================================================================================================
# 1. pass@N
#
# A model answers a problem by sampling. Let p be the probability that one sample is right. Give it N tries and
# count the problem as solved if any of them is right: it fails only if all N fail.
# ==========================================================================================================


def pass_at_n(p, N):
    """pass@N = 1 - (1 - p)^N of each problem, exactly, for success probabilities p (a number or any shape).

    Returns float64 of the same shape. By way of log(1 - p), so that p = 1e-12 and N = 1,000,000 lose no digit."""
    p = torch.as_tensor(p, dtype=torch.float64)
    return -torch.expm1(N * torch.log1p(-p))


def estimate_pass_at_n(num_samples, num_correct, N):
    """Unbiased estimate of pass@N from n samples of which c were right, for when p itself cannot be had.

    1 - C(n - c, N) / C(n, N): the share of all choices of N among the n samples that hold a right one, here as the
    product 1 - Π_{j<c} (1 - N / (n - j)). (Putting c / n for p into the formula above would be biased.)
    num_correct: a number or a tensor of any shape, from 0 to n. Raises ValueError where N > n or c > n.
    Source: Chen et al. 2021, arXiv 2107.03374."""
    if not 1 <= N <= num_samples:
        raise ValueError(f"pass@{N} cannot be estimated from {num_samples} samples: draw at least N")
    num_correct = torch.as_tensor(num_correct)
    if ((num_correct < 0) | (num_correct > num_samples)).any():
        raise ValueError(f"of {num_samples} samples, 0 to {num_samples} can be right")
    j = torch.arange(num_samples, dtype=torch.float64)
    all_fail = torch.cumprod((1 - N / (num_samples - j)).clamp(min=0), dim=0)  # [c - 1]: C(n - c, N) / C(n, N)
    all_fail = torch.cat([torch.ones(1, dtype=torch.float64), all_fail])
    return 1 - all_fail[num_correct.long()]


# ==========================================================================================================
# 2. The loss
#
# Cross-entropy, -log p, asks for the first try to be right. With N tries the thing to ask for is that any of them
# is: minus the logarithm of pass@N. That is the whole idea. What it changes is seen in the gradient:
#
#     d/dθ [-log(1 - (1 - p)^N)] = F(N, p) · d/dθ [-log p],      F(N, p) = N p (1 - p)^(N-1) / (1 - (1 - p)^N)
#
# by the chain rule, dp = p · d log p. The factor F is 1 while p is far below 1/N: the example pulls as it does under
# cross-entropy. Around p = 1/N, where N samples begin to find the answer (the expected number of right ones, N p,
# passes 1), F falls, and beyond it is 0: an example that is already solved stops pulling, and the model is not made
# surer than N tries need. With N = 1, F is 1 everywhere, and the loss is cross-entropy itself.
# ==========================================================================================================


def dco_loss(log_p, N):
    """The limited loss (Direct Coverage Optimization): L_N = -log(1 - (1 - p)^N) of each example, in nats.

    log_p: (B,) log-probabilities of the right answers, each the sum over the answer's tokens. Returns (B,), in the
    dtype of log_p; take the mean and call backward. Nothing is detached: the factor F(N, p) of the gradient is
    autograd's own work. Good to 1e-5 in float32 and 1e-12 in float64 (relative), with a finite gradient, for N from
    1 to 1,000,000 and log_p from 0 to -2000, where p itself has long underflowed. Raises ValueError for N < 1.
    Source: arXiv 2502.07154."""
    if N < 1:
        raise ValueError(f"N is the number of tries, 1 or more; got {N}")
    if N == 1:
        return -log_p  # cross-entropy
    x = log_p if log_p.device.type == "mps" else log_p.double()  # N log(1 - p) loses digits in float32
    log_fail = N * log1mexp(x.clamp(-50, -1e-30))  # log (1 - p)^N
    few = -x - math.log(N)  # where p < e^-50, 1 - (1 - p)^N is N p to the last digit
    return torch.where(x < -50, few, -log1mexp(log_fail)).to(log_p.dtype)


def log1mexp(x):
    """log(1 - e^x) for x < 0, by whichever of two forms does not cancel (Mächler 2012). The clamps keep the form
    that is not chosen finite, since autograd multiplies its gradient by 0, and 0 · inf is nan."""
    edge = -math.log(2)
    return torch.where(x > edge, torch.log(-torch.expm1(x.clamp(min=edge))),
                       torch.log1p(-torch.exp(x.clamp(max=edge))))


def overconfidence_factor(log_p, N):
    """F(N, p) = N p (1 - p)^(N-1) / (1 - (1 - p)^N) of each example, between 0 and 1: what is left of cross-entropy's
    gradient under the limited loss, F = -d L_N / d log p. log_p: (B,); returns (B,), precise as `dco_loss` is.

    Training needs it only where p is an estimate: there it weights cross-entropy (see `train`)."""
    if N == 1:
        return torch.ones_like(log_p)
    x = log_p if log_p.device.type == "mps" else log_p.double()
    log_p_fail = log1mexp(x.clamp(-50, -1e-30))
    log_factor = math.log(N) + x + (N - 1) * log_p_fail - log1mexp(N * log_p_fail)
    return torch.where(x < -50, torch.ones_like(x), log_factor.exp()).to(log_p.dtype)


def coverage_loss(log_p, N):
    """A third loss, not in the paper: -log of the batch's mean pass@N; the limited loss is the mean of -log pass@N.

    log_p: (B,). Returns a scalar, in log space throughout, so precise and finite wherever `dco_loss` is. Its gradient
    weights each example by its share of the batch's pass@N besides F: it maximizes what the test counts, and gives up
    the examples that cost too much of it."""
    return math.log(len(log_p)) - torch.logsumexp(-dco_loss(log_p, N), dim=0)


LOSSES = {  # from the batch's log_p (B,) and N to the number that is minimized
    "ce": lambda log_p, N: -log_p.mean(),
    "limited": lambda log_p, N: dco_loss(log_p, N).mean(),
    "coverage": coverage_loss,
}

# ==========================================================================================================
# 3. A small GPT
#
# The usual decoder: token and position embeddings, blocks of attention and MLP, logits for the next token. Attention is
# written out, since for texts this short that is faster than PyTorch's own. Two more things are for speed and change no
# number. `last`: where only the last few logits are wanted (the answer's), the last block computes only those. `cache`:
# in sampling, the keys and values of past positions are kept, not computed anew.
# ==========================================================================================================


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
        """x (B, T, C) -> (B, Q, C): its last Q positions, looking at K positions where mask (Q, K) is 0, not -inf."""
        B, T, C = x.shape
        Q, K = mask.shape
        normed = self.ln_1(x)
        q = self.query(normed[:, -Q:])
        k, v = self.key_value(normed).split(C, dim=-1)
        q, k, v = (t.view(B, -1, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, heads, ·, ·)
        if cache is not None:  # (2, B, heads, ·, ·): the K - T positions before x are in it already
            cache[0][:, :, K - T:K], cache[1][:, :, K - T:K] = k, v
            k, v = cache[:, :, :, :K]
        attended = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + mask).softmax(dim=-1) @ v
        x = x[:, -Q:] + self.projection(attended.transpose(1, 2).reshape(B, Q, C))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_layer=2, n_head=4, n_embd=128):
        super().__init__()
        self.n_layer, self.n_head, self.n_embd = n_layer, n_head, n_embd
        self.token_embedding = nn.Embedding(vocab_size, n_embd)
        self.position_embedding = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        self.register_buffer("causal", torch.full((block_size, block_size), -torch.inf).triu(1), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, last=None, cache=None, start=0):
        """tokens (B, T) int64 -> logits (B, T, vocab_size), or (B, last, vocab_size). With a cache, the tokens stand
        at positions start … start + T - 1, after those that are in it."""
        end = start + tokens.shape[1]
        x = self.token_embedding(tokens) + self.position_embedding.weight[start:end]
        for i, block in enumerate(self.blocks):
            first = end - last if last and i == self.n_layer - 1 else start  # the first position still wanted
            x = block(x, self.causal[first:end, :end], None if cache is None else cache[i])
        return self.head(self.ln(x))

    def new_cache(self, B, length):
        """Room for the keys and values of B texts of at most `length` tokens."""
        shape = self.n_layer, 2, B, self.n_head, length, self.n_embd // self.n_head
        return torch.empty(shape, device=self.head.weight.device)


@torch.no_grad()
def sample(model, prompts, num_new_tokens, temperature=1.0, generator=None, cache=None):
    """Continue prompts (B, T) by sampling each next token from softmax(logits / temperature), greedily at
    temperature 0. Returns the (B, num_new_tokens) new tokens. A cache that is given is left filled."""
    if cache is None:
        # In chunks that share one cache: a large one would spend its time waiting for memory.
        cache = model.new_cache(min(len(prompts), 1024), prompts.shape[1] + num_new_tokens)
        return torch.cat([sample(model, x, num_new_tokens, temperature, generator, cache[:, :, :len(x)])
                          for x in prompts.split(1024)])
    tokens, start, new_tokens = prompts, 0, []
    for _ in range(num_new_tokens):
        logits = model(tokens, last=1, cache=cache, start=start)[:, 0]
        start += tokens.shape[1]
        if temperature == 0:
            tokens = logits.argmax(dim=-1, keepdim=True)
        else:
            tokens = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
        new_tokens.append(tokens)
    return torch.cat(new_tokens, dim=1)


# ==========================================================================================================
# 4. Measuring
#
# Where the answers are short and a problem has one right answer, its success probability needs no sampling: one pass
# over prompt and answer gives p(y|x) = Π_t p(y_t | x, y_<t), and pass@N for every N follows exactly. Dividing the
# logits by T before the softmax gives, from the same pass, what sampling at temperature T would reach.
#
# With a reasoning trace before the answer, p(y|x) is a sum over all traces, far too many to go through: traces are
# sampled, the right ones counted, and pass@N is estimated. A proof has many steps and many forms, but few states: p
# is exact again, by dynamic programming.
# ==========================================================================================================

TRIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # pass@N is measured for these N, and for the run's own
COLUMNS = (1, 8, 64, 512)  # and shown for these
TEMPERATURES = (1.0, 0.7, 1.3, 1.6, 2.0, 2.5)
TRACES = {1.0: 128, 1.3: 64, 1.6: 64}  # where p is estimated: how many traces are sampled at each temperature


def measure(model, task, split, temperatures=TEMPERATURES):
    """{temperature: (p, confidence, number of samples)} of a task's test problems, or (split "train") of some training
    problems. p and confidence: (P,) float64 on the CPU, the probability that a sample is right, and that it is the
    model's own greedy answer; exact, and the number None, or the shares among that number of samples."""
    if task.searches:
        return measure_proofs(model, task.searches[split], temperatures)
    device = model.head.weight.device
    examples = task.test if split == "test" else [tensor[:100 if task.final else 500] for tensor in task.train]
    prompts, answers = (tensor.to(device) for tensor in examples)
    if task.final:
        generator = torch.Generator(device).manual_seed(0)  # the same luck for every model
        return {T: (*measure_traces(model, prompts, answers, task.final, TRACES[T], T, generator), TRACES[T])
                for T in temperatures if T in TRACES}
    return measure_answers(model, prompts, answers, temperatures)


def answer_logits(model, prompts, answers, allowed=None):
    """The logits (B, A, vocab_size) that predict the answers' tokens, each with the right ones before it. Where allowed
    (B, vocab_size) is given, no other token gets any probability."""
    logits = model(torch.cat([prompts, answers[:, :-1]], dim=1), last=answers.shape[1])
    return logits if allowed is None else logits.masked_fill(~allowed[:, None], -torch.inf)


def answer_log_p(logits, answers, temperature=1.0):
    """log p(y|x) = Σ_t log p(y_t | x, y_<t): (B,), from `answer_logits`. Padding behind the answers counts nothing."""
    return -F.cross_entropy((logits / temperature).transpose(1, 2), answers, ignore_index=PAD,
                            reduction="none").sum(dim=1)


@torch.no_grad()
def measure_answers(model, prompts, answers, temperatures):
    """`measure` where the whole answer counts: exact, and one pass serves all temperatures."""
    log_p, log_confidence = [], []
    room = model.new_cache(250, prompts.shape[1] + answers.shape[1])
    for x, y in zip(prompts.split(250), answers.split(250)):
        cache = room[:, :, :len(x)]
        greedy = sample(model, x, y.shape[1], temperature=0, cache=cache)  # from here on the cache knows the prompts
        is_end = greedy == END
        greedy[is_end.cumsum(dim=1) - is_end.long() > 0] = PAD  # behind the end, whatever was sampled is no answer
        for result, answer in ((log_p, y), (log_confidence, greedy)):
            logits = model(torch.cat([x[:, -1:], answer[:, :-1]], dim=1), cache=cache, start=x.shape[1] - 1)
            result.append(torch.stack([answer_log_p(logits, answer, T) for T in temperatures]))
    p, confidence = (torch.cat(result, dim=1).cpu().double().exp() for result in (log_p, log_confidence))
    return {T: (p[i], confidence[i], None) for i, T in enumerate(temperatures)}


@torch.no_grad()
def measure_traces(model, prompts, answers, final, num_samples, temperature=1.0, generator=None):
    """p and confidence where only the last `final` tokens of a trace count: of num_samples sampled traces, the share
    that ends in the right answer, and the share that ends as the greedy trace does."""
    counts = []
    for x, y in zip(prompts.split(32), answers.split(32)):
        traces = sample(model, x.repeat_interleave(num_samples, dim=0), y.shape[1], temperature, generator)
        ends = traces[:, -final:].view(len(x), num_samples, final)
        greedy = sample(model, x, y.shape[1], temperature=0)
        counts.append([(ends == end[:, None, -final:]).all(dim=2).sum(dim=1) for end in (y, greedy)])
    return [torch.cat(count).cpu().double() / num_samples for count in zip(*counts)]


@torch.no_grad()
def measure_proofs(model, search, temperatures):
    """`measure` for attempts at theorems: exact. The greedy attempt takes the likeliest tactic in every state, and the
    confidence is the probability of all its choices, whether it proves the theorem or not."""
    logits = tactic_logits(model, search)
    result = {}
    for T in temperatures:
        policy = F.softmax(logits / T, dim=-1)
        greedy = policy * F.one_hot(policy.argmax(dim=-1), policy.shape[1])
        result[T] = proof_p(policy, search), proof_p(greedy, search, failure=1.0), None
    return result


@torch.no_grad()
def tactic_logits(model, search):
    """The tactics' logits in all states of a `Search`: (S, vocab_size), float64, -inf where a tactic does not apply."""
    prompts = search.prompts.to(model.head.weight.device)
    logits = torch.cat([model(x, last=1)[:, 0] for x in prompts.split(250)])
    return logits.cpu().double().masked_fill(~search.applicable, -torch.inf)


def proof_p(policy, search, failure=0.0):
    """The probability that an attempt proves each theorem: (P,) float64. policy: (S, vocab_size), the probability of
    each tactic in each state of the `Search`.

    A state is proved if a tactic is chosen all of whose remaining states are proved, each by choices of its own. With d
    tactics left on a branch that is p_d(s) = Σ_t policy(t|s) Π_s' p_(d-1)(s'), and p_0 = `failure` = 0."""
    p = torch.full((len(policy) + 2,), failure, dtype=torch.float64)
    p[-2] = 1  # the row of what is proved; the last row is a dead end's
    for _ in range(MAX_DEPTH):
        p[:-2] = (policy * p[search.left].prod(dim=-1)).sum(dim=-1)
    return p[search.theorems]


def attempt_proof(policy, search, row, generator=None, depth=MAX_DEPTH):
    """One sampled attempt at the state of a row: the steps [(row, tactic's token, depth left), …] if it proves it, else
    None."""
    if depth == 0 or row > len(policy):
        return None
    token = torch.multinomial(policy[row], 1, generator=generator).item()
    steps = [(row, token, depth)]
    for part in search.left[row, token].tolist():
        if part != len(policy):  # not yet proved
            proof = attempt_proof(policy, search, part, generator, depth - 1)
            if proof is None:
                return None
            steps += proof
    return steps


def summary(p, confidence, num_samples, tries):
    """{"pass@1": …, "confidence": …}: means over the problems, of what `measure` gives for one temperature. From
    samples there is no pass@N for more tries than samples."""
    if num_samples:
        result = {n: estimate_pass_at_n(num_samples, (p * num_samples).round(), n) for n in tries if n <= num_samples}
    else:
        result = {n: pass_at_n(p, n) for n in tries}
    return {f"pass@{n}": value.mean().item() for n, value in result.items()} | {"confidence": confidence.mean().item()}


# ==========================================================================================================
# 5. Training
#
# One loop for every loss and task. A run is a plain dictionary, saved after every evaluation.
# ==========================================================================================================

# The same for every loss. N is the limited loss's: in `prove`, for each tactic. Hiding a share of a question's words,
# other ones each time, makes questions harder to learn by heart, and matters on MATH. traces, interval: see `train`.
SETTINGS = {
    "multiply": dict(N=64, epochs=75, evaluations=15, batch_size=100, learning_rate=1.5e-3, hidden_words=0.0,
                     n_layer=2, n_head=4, n_embd=128),
    "cot": dict(N=64, epochs=120, evaluations=12, batch_size=50, learning_rate=3e-3, hidden_words=0.0,
                n_layer=2, n_head=4, n_embd=64, traces=32, interval=2),
    "prove": dict(N=4, epochs=60, evaluations=12, batch_size=50, learning_rate=3e-3, hidden_words=0.0,
                  n_layer=2, n_head=4, n_embd=64),
    "math": dict(N=64, epochs=22, evaluations=25, batch_size=50, learning_rate=2e-3, hidden_words=0.2,
                 n_layer=2, n_head=4, n_embd=128),
}


def train(task, loss="limited", N=None, seed=0, device="cpu", path=None, **changes):
    """Train a new GPT on a task and measure it as it learns. Returns the run (see the README) and the model.

    With loss "ce" the training N is 1, whatever N, and N only says which pass@N the progress bar shows. Where a path
    is given the run is saved there after every evaluation. `changes` are to the task's `SETTINGS`, epochs=10 say.

    Where p(y|x) sums over traces, autograd has only the log p of the one trace that is trained on. The limited loss is
    then the paper's approximate one: F(N, p̂) times that trace's cross-entropy, where p̂ is the share of right ones
    among `traces` traces sampled for each training problem, anew every `interval` epochs. With p̂ = 0, F is 1."""
    settings = SETTINGS[task.name] | changes
    N, epochs, batch_size = N or settings["N"], settings["epochs"], settings["batch_size"]
    examples = [tensor.to(device) for tensor in task.train]  # prompts, answers, and for proofs what else was allowed
    num_examples, prompt_length = examples[0].shape
    torch.manual_seed(seed)  # the same first weights and the same order of examples for every loss
    model = GPT(len(task.vocab), prompt_length + examples[1].shape[1],
                **{key: settings[key] for key in ("n_layer", "n_head", "n_embd")}).to(device)
    # Adam divides a gradient by its own recent size, and so would undo what F does where *every* example is nearly
    # solved; an eps far above the usual 1e-8 lets a small gradient make a smaller step.
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), eps=1e-3, weight_decay=0.0, fused=True)
    order, sampler = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)
    num_steps, step = epochs * math.ceil(num_examples / batch_size), 0
    weights = None

    def objective(log_p, batch):
        return LOSSES[loss](log_p, N) if weights is None else -(weights[batch] * log_p).mean()

    run = {"task": task.name, "loss": loss, "N": 1 if loss == "ce" else N, "seed": seed,
           "config": settings | {"device": device}, "tokens_per_second": 0, "history": [], "problems": {}}
    num_tokens = num_examples * (prompt_length + examples[1].shape[1] - 1)  # read in an epoch
    start, step_seconds = time.perf_counter(), 0.0
    with tqdm(total=num_steps, desc=f"{task.name} {name_of(loss, run['N'])}, seed {seed}") as bar:
        for epoch in range(epochs + 1):
            if epoch == epochs or epoch % math.ceil(epochs / settings["evaluations"]) == 0:
                measured, run["problems"] = evaluate(model, task, sorted({*TRIES, N}))
                with torch.no_grad():
                    x, y, *allowed = (tensor[:500] for tensor in examples)
                    value = objective(answer_log_p(answer_logits(model, x, y, *allowed), y), slice(500)).item()
                if epoch:
                    run["tokens_per_second"] = round(epoch * num_tokens / step_seconds)
                seconds = round(time.perf_counter() - start, 2)
                run["history"].append({"epoch": epoch, "loss": value, "seconds": seconds} | measured)
                if path:
                    save(run, path)
                shown = ("pass@1", f"pass@{aim(task.name, N)}", "confidence")
                bar.set_postfix_str(f"epoch {epoch}, loss {value:.2f}, " + ", ".join(
                    f"{key} {mean:.3f}" for key, mean in measured["test"].items() if key in shown))
            if epoch == epochs:
                break
            if task.final and loss == "limited" and epoch % settings["interval"] == 0:
                p, _ = measure_traces(model, *examples, task.final, settings["traces"], generator=sampler)
                weights = overconfidence_factor(p.log(), N).float().to(device)
            began = time.perf_counter()
            for batch in torch.randperm(num_examples, generator=order).to(device).split(batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = settings["learning_rate"] * schedule(step / num_steps)
                x, y, *allowed = (tensor[batch] for tensor in examples)
                if settings["hidden_words"]:
                    hidden = torch.rand(x.shape, device=device) < settings["hidden_words"]
                    x = x.masked_fill(hidden & (x != PAD), UNKNOWN)
                log_p = answer_log_p(answer_logits(model, x, y, *allowed), y)
                optimizer.zero_grad()
                objective(log_p, batch).backward()
                optimizer.step()
                step += 1
                bar.update()
            log_p.sum().item()  # wait for the GPU
            step_seconds += time.perf_counter() - began
    return run, model


def evaluate(model, task, tries):
    """What a run records at an epoch: the summaries by split and temperature, and the test problems one by one."""
    by_temperature = measure(model, task, "test")
    tempered = {f"{T:g}": summary(*measured, tries) for T, measured in by_temperature.items()}
    p, confidence, _ = by_temperature[1.0]
    problems = {"p": p.tolist(), "confidence": confidence.tolist()}
    if task.searches:
        problems |= {key: getattr(task.searches["test"], key).tolist() for key in ("length", "branching", "blind")}
    return {"test": tempered.pop("1"), "train": summary(*measure(model, task, "train", [1.0])[1.0], tries),
            "tempered": tempered}, problems


def aim(task_name, N):
    """The N of the pass@N that training with N aims at. In `prove`, where N is for each tactic, it is 64 attempts."""
    return 64 if task_name == "prove" else N


def schedule(done):
    """The learning rate's factor when a share `done` of training is done: up over 5 %, then a cosine down to 0.1."""
    return min(1, 0.01 + done / 0.05) * (0.55 + 0.45 * math.cos(math.pi * done))


def save(run, path):
    """Write a run as JSON, whole or not at all: to a file beside it, which then takes its name."""
    path = Path(path)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(run))
    os.replace(partial, path)


# ==========================================================================================================
# 6. Theory
#
# Why does each loss do what it does? Take the network away. Where the answer stays uncertain (answer y is right with
# probability p_y, and nothing in the question tells more), a policy q over the answers reaches
# pass@N = Σ_y p_y (1 - (1 - q_y)^N). Which q is best, and where does each loss lead?
# ==========================================================================================================


def optimal_policy(p, N):
    """The policy q that maximizes pass@N = Σ_i p_i (1 - (1 - q_i)^N) over Σ_i q_i = 1; the coverage loss tends to it.

    The derivative of the Lagrangian, N p_i (1 - q_i)^(N-1) - N λ, is zero, or the answer is given up, so
        q_i = max(0, 1 - (λ / p_i)^(1/(N-1))),
    water-filling: the larger N, the flatter. If the k likeliest answers are kept, the sum gives λ in closed form,
    λ^(1/(N-1)) = (k - 1) / Σ_{i≤k} p_i^(-1/(N-1)), and k is the most for which q_k > 0. With N = 1 it is all on the
    likeliest answer; if several are, they share it equally.
    p: (K,) numbers from 0 on, not all 0 (their scale does not matter). Returns (K,), float64 numpy, sum 1."""
    p = np.asarray(p, dtype=np.float64)
    if N == 1:
        best = p == p.max()
        return best / best.sum()
    order = np.argsort(-p, kind="stable")[:np.count_nonzero(p)]
    log_height = (np.log(p[order[0]]) - np.log(p[order])) / (N - 1)  # ≥ 0 and growing
    height = np.exp(np.minimum(log_height, 700))
    total = np.cumsum(height)
    k = np.count_nonzero(np.arange(len(height)) * height < total)
    q = np.zeros_like(p)
    q[order[:k]] = 1 - (k - 1) * height[:k] / total[k - 1]
    return q


def limited_policy(p, N):
    """The policy q that minimizes the limited loss, Σ_i p_i L_N(q_i) over Σ_i q_i = 1: where that loss tends.

    The derivative of the Lagrangian is zero where
        N p_i (1 - q_i)^(N-1) / (1 - (1 - q_i)^N) = λ   for every i,
    that is p_i F(N, q_i) / q_i = λ. Where q_i ≪ 1/N, F is 1 and q_i = p_i / λ, in proportion as cross-entropy has it
    (for N = 1 everywhere: q = p); beyond 1/N, q_i is held back. The logarithm gives no possible answer up.
    Solved by bisection, in u = -log(1 - q): every u_i given the likeliest answer's, and that one by the sum.
    p: (K,) numbers from 0 on, not all 0. Returns (K,), float64 numpy, sum 1 within 1e-9."""
    p = np.asarray(p, dtype=np.float64)
    if N == 1 or np.count_nonzero(p) == 1:
        return p / p.sum()
    log_odds = np.log(p.max()) - np.log(p[p > 0])

    def pull(log_u):  # log(λ / p_i), decreasing in u_i
        u = np.exp(log_u)
        return math.log(N) - (N - 1) * u - np.log(-np.expm1(-N * u))

    def bisect(is_low, low, high):
        for _ in range(80):
            middle = (low + high) / 2
            low, high = np.where(is_low(middle), middle, low), np.where(is_low(middle), high, middle)
        return low

    def policy(top):  # top: log u of the likeliest answer
        target = pull(top) + log_odds
        return -np.expm1(-np.exp(bisect(lambda log_u: pull(log_u) > target, np.full(len(target), -745.0), top)))

    q = np.zeros_like(p)
    q[p > 0] = policy(bisect(lambda top: policy(top).sum() < 1, math.log(0.5 / len(log_odds)), math.log(40)))
    return q


def confident_pass_at_n(c, N, a, K):
    """The one-parameter picture. A model puts probability c, its confidence, on its favourite answer, which is right
    with probability a, and spreads the rest evenly over the K - 1 others:
        pass@N(c) = a (1 - (1 - c)^N) + (1 - a) (1 - (1 - (1 - c) / (K - 1))^N).
    At c = 1 that is a for every N: no amount of sampling helps. c: a number or an array."""
    return a * pass_at_n(c, N) + (1 - a) * pass_at_n((1 - torch.as_tensor(c)) / (K - 1), N)


def best_confidence(N, a, K):
    """The c that maximizes `confident_pass_at_n`: the optimal policy's first entry where one answer is right with
    probability a and the others share 1 - a (equal answers get equal q, so the picture's family holds the optimum)."""
    return optimal_policy([a] + [(1 - a) / (K - 1)] * (K - 1), N)[0]


def descend(weights, loss, N, num_steps, learning_rate):
    """Gradient descent on bare logits z (P, K), q = softmax(z), a row for each problem, from z = 0. Yields q (P, K)
    at every step. weights (P, K): how often the loss sees each answer, rows of sum 1. With the probabilities p it
    minimizes the loss over the whole population, Σ_y p_y L_N(q_y); with a 1 a row, over one sampled label each."""
    logits = torch.zeros_like(weights, requires_grad=True)
    for _ in range(num_steps):
        log_q = F.log_softmax(logits, dim=-1)
        yield log_q.detach().exp()
        losses = dco_loss(log_q, 1 if loss == "ce" else N)
        if loss == "coverage":  # -log of the mean of p · pass@N; its gradient is the mean's over all problems
            value = -torch.logsumexp(torch.log(weights) - losses, dim=(0, 1)) * len(weights)
        else:
            value = (weights * losses).sum()
        gradient, = torch.autograd.grad(value, logits)
        logits = (logits - learning_rate * gradient).detach().requires_grad_()


def blind_pass_at_n(task, policy, N):
    """The test set's pass@N of a guesser who never reads the question: it knows how often each answer is right among
    the training problems, p, and samples from policy(p, N)."""
    q = torch.as_tensor(policy(task.guesses.numpy(), N))
    return pass_at_n(torch.where(task.test_guess >= 0, q[task.test_guess], 0.0), N).mean().item()


# ==========================================================================================================
# 7. Tables and figures
#
# All from the saved runs; nothing here is needed to understand the rest.
# ==========================================================================================================

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLORS = {"ce": "#D55E00", "limited": "#0072B2", "coverage": "#009E73"}
MORE_COLORS = ["#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def name_of(loss, N):
    return "cross-entropy" if loss == "ce" else f"{loss} N={N}"


def load_runs(out, task_name):
    """The task's saved runs in a folder, those that differ only in the seed together: {(loss, N, epochs): [run, …]},
    cross-entropy first."""
    groups = defaultdict(list)
    for path in sorted(Path(out).glob(f"{task_name}-*-seed*.json")):
        try:
            run = json.loads(path.read_text())
            key = run["loss"], run["N"], run["config"]["epochs"]
            run["history"][-1]["tempered"], run["problems"]["confidence"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            print(f"left out {path}, which is not a run's file ({error!r}); remove it", file=sys.stderr)
        else:
            groups[key].append(run)
    return {key: groups[key] for key in sorted(groups)}


def measured_tries(groups, everywhere=False):
    """The N, in order, whose pass@N all runs have measured, or have measured at every temperature."""
    records = [record for runs in groups.values() for run in runs for record in run["history"]]
    tests = [record["test"] for record in records]
    if everywhere:
        tests += [test for record in records for test in record["tempered"].values()]
    return sorted(set.intersection(*({int(key[5:]) for key in test if key.startswith("pass@")} for test in tests)))


def labels_of(groups):
    """{group: its name}, with the number of epochs where two groups differ only in that."""
    names = [name_of(loss, N) for loss, N, _ in groups]
    return {key: name if names.count(name) == 1 else f"{name}, {key[2]} epochs" for key, name in zip(groups, names)}


def mean_and_error(values):
    """Mean and standard error over the first axis, the seeds; an error of 0 where there is only one."""
    values = np.array(values, dtype=np.float64)
    error = values.std(axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0 * values[0]
    return values.mean(axis=0), error


def curve(runs, value):
    """The epochs that all runs have, and the mean and standard error over the runs of value(evaluation) there."""
    epochs = sorted(set.intersection(*({record["epoch"] for record in run["history"]} for run in runs)))
    values = [[value(record) for record in run["history"] if record["epoch"] in epochs] for run in runs]
    return epochs, *mean_and_error(values)


def at(run, N, stage):
    """The test set's measurements at a stage of a run. The best epoch and temperature for pass@N are chosen on the
    test set itself, which flatters whoever is measured so: here, cross-entropy."""
    if stage == "at the end":
        return run["history"][-1]["test"]
    candidates = [record["test"] for record in run["history"]]
    if stage == "best epoch and temperature":
        candidates += [tempered for record in run["history"] for tempered in record["tempered"].values()]
    return max(candidates, key=lambda test: test[f"pass@{N}"])


STAGES = {"ce": ["at the end", "best epoch", "best epoch and temperature"], "coverage": ["at the end", "best epoch"]}


def print_table(groups, task, N):
    """One row for each loss and stage, then the blind guessers': mean over the seeds ± standard error."""
    tries = [n for n in measured_tries(groups) if n in (*COLUMNS, N)]
    columns = [*(f"pass@{n}" for n in tries), "confidence"]
    rows = {f"{label}, {stage}": [[at(run, N, stage)[column] for column in columns] for run in groups[key]]
            for key, label in labels_of(groups).items() for stage in STAGES.get(key[0], ["at the end"])}
    for label, blind in blind_rivals(task, groups).items():
        rows[label] = [[blind(n) for n in tries]]
    print_rows(columns, rows)


def print_rows(columns, rows):
    """rows: {label: one list of values for each seed}."""
    width = max(map(len, rows))
    print(" " * width + "".join(f"{column:>15}" for column in columns))
    for label, values in rows.items():
        cells = ["–" if math.isnan(mean) else f"{mean:.3f} ± {error:.3f}" if len(values) > 1 else f"{mean:.3f}"
                 for mean, error in zip(*mean_and_error(values))]
        print(f"{label:{width}}" + "".join(f"{cell:>15}" for cell in cells))


def blind_rivals(task, groups):
    """{name: N -> pass@N} of rivals that learn nothing of the single problem: guessers, and search by chance."""
    if task.searches:
        blind = torch.tensor([run["problems"]["blind"] for runs in groups.values() for run in runs])
        return {"blind search": lambda N: pass_at_n(blind, N).mean().item()}
    policies = {} if task.guesses is None else {
        "blind, training frequencies": lambda p, N: p,
        "blind, where the limited loss tends for each N": limited_policy,
        "blind, optimal for each N": optimal_policy}
    return {name: functools.partial(blind_pass_at_n, task, policy) for name, policy in policies.items()}


def in_words(groups, N):
    """What happened, as a sentence or two, from the numbers."""
    labels, sentences, rival = labels_of(groups), [], None
    for key, runs in groups.items():
        end, best, tempered = (np.mean([at(run, N, stage)[f"pass@{N}"] for run in runs])
                               for stage in ("at the end", "best epoch", "best epoch and temperature"))
        if key[0] == "ce":
            rival = rival or (end, best, tempered)
            first, last = (np.mean([at(run, N, stage)["pass@1"] for run in runs])
                           for stage in ("best epoch", "at the end"))
            moved = f"{'rose' if last > first else 'fell'} from {first:.3f} to {last:.3f}"
            sentences.append(
                f"Cross-entropy's pass@{N} peaked at {best:.3f} and fell to {end:.3f} with more training, while its "
                f"pass@1 {moved}." if end < 0.95 * best else
                f"Cross-entropy's pass@{N} did not fall in these epochs: best {best:.3f}, at the end {end:.3f}.")
        else:
            versus = "" if rival is None or not all(rival) else ": " + ", ".join(
                f"{end / value:.2f} times {which}" for which, value in
                zip(("cross-entropy's end", "its best epoch", "its best epoch and temperature"), rival))
            name = labels[key][0].upper() + labels[key][1:]
            sentences.append(f"{name} ended at {end:.3f}{versus}.")
    return " ".join(sentences)


def print_trace(model, task):
    """A right reasoning trace for the first test problem that has one among 64 sampled ones."""
    device = model.head.weight.device
    generator = torch.Generator(device).manual_seed(0)
    for prompt, answer in zip(*task.test):
        traces = sample(model, prompt.to(device).expand(64, -1), len(answer), generator=generator).cpu()
        right = traces[(traces[:, -task.final:] == answer[-task.final:]).all(dim=1)]
        if len(right):
            text = "".join(task.vocab[token] for token in [*prompt, *right[0]])
            print(f"\nA test problem and a right trace, one of {len(right)} among 64: {text}")
            return


def print_proof(model, task):
    """The first test theorem that is proved within 64 attempts, and the proof: each line a goal and the tactic used on
    it; what the tactic leaves to prove stands below, indented."""
    search, generator = task.searches["test"], torch.Generator().manual_seed(0)
    policy = F.softmax(tactic_logits(model, search), dim=-1)
    attempts = ((row, n, attempt_proof(policy, search, row, generator))
                for row in search.theorems.tolist() for n in range(1, 65))
    row, n, proof = next((attempt for attempt in attempts if attempt[2]), (None, None, None))
    if proof is None:
        return
    hypotheses, goal = search.states[row]
    print(f"\nA test theorem, and the proof that attempt {n} found:")
    for number, formula in enumerate(hypotheses, 1):
        print(f"  {number}: {show(formula)}")
    print(f"  ⊢ {show(goal)}")
    for row, token, depth in proof:
        hypotheses, goal = search.states[row]
        tactic = token - FIRST_TACTIC
        if tactic:
            used = f"apply {tactic}: {show(hypotheses[tactic - 1])}"
        else:
            (assumed, _), = apply_tactic((hypotheses, goal), tactic)
            used = f"intro {assumed.index(goal[0]) + 1}: {show(goal[0])}"
        print(f"{'  ' * (MAX_DEPTH - depth + 2)}{show(goal)}".ljust(28) + used)


def draw(groups, task, N, path):
    """The main figure: what each loss does to pass@1, pass@N and confidence as training goes on, and at its end."""
    labels, more, colors = labels_of(groups), iter(MORE_COLORS * 9), {}
    for key in groups:
        color = COLORS.get(key[0])
        fresh = color not in (None, *colors.values()) and key[1] in (1, N, SETTINGS[task.name]["N"])
        colors[key] = color if fresh else next(more)
    measured = [n for n in measured_tries(groups) if n in TRIES]
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.2), layout="constrained")
    (pass_1, pass_N, confidence), (histogram, tries, temperature) = axes

    def line(axis, xs, mean, error, **style):
        axis.plot(xs, mean, **style)
        axis.fill_between(xs, mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)

    tempered = set.intersection(*({*run["history"][0]["tempered"]} for runs in groups.values() for run in runs))
    temperatures = sorted([1.0, *map(float, tempered)])
    by_T = lambda record: [(record["tempered"] | {"1": record["test"]})[f"{T:g}"][f"pass@{N}"] for T in temperatures]
    for key, runs in groups.items():
        color, label = colors[key], labels[key]
        for axis, n in ((pass_1, 1), (pass_N, N)):
            line(axis, *curve(runs, lambda record: record["test"][f"pass@{n}"]), color=color)
        line(confidence, *curve(runs, lambda record: record["test"]["confidence"]), color=color)
        line(confidence, *curve(runs, lambda record: record["train"]["confidence"]), color=color, linestyle=":")
        values = np.concatenate([run["problems"]["confidence"] for run in runs])
        histogram.hist(values, bins=np.linspace(0, 1, 26), weights=np.full(len(values), 1 / len(values)),
                       histtype="stepfilled", color=color, alpha=0.35, edgecolor=color)
        for stage, style in (("at the end", "-"), ("best epoch", "--")):
            if stage == "at the end" or key[0] == "ce":
                shown = f"{label}, {stage}" if key[0] == "ce" else label
                values = [[at(run, N, stage)[f"pass@{n}"] for n in measured] for run in runs]
                line(tries, measured, *mean_and_error(values), color=color, linestyle=style, label=shown)
                by_temperature = [[by_T(record) for record in run["history"]] for run in runs]  # (seeds, epochs, T)
                line(temperature, temperatures, *mean_and_error(
                    [values[-1] if stage == "at the end" else np.max(values, axis=0) for values in by_temperature]),
                    color=color, linestyle=style, marker="o", markersize=4)
        if key[0] == "ce":
            epochs, mean, _ = curve(runs, lambda record: record["test"][f"pass@{N}"])
            best = int(np.argmax(mean))
            for axis, n in ((pass_1, 1), (pass_N, N)):
                _, values, _ = curve(runs, lambda record: record["test"][f"pass@{n}"])
                axis.plot(epochs[best], values[best], "*", color=color, markersize=15, markeredgecolor="black")

    for (label, blind), style in zip(blind_rivals(task, groups).items(), (":", "--", "-.")):
        tries.plot(measured, [*map(blind, measured)], color="grey", linestyle=style, label=label)
        for axis, n in ((pass_1, 1), (pass_N, N)):
            axis.axhline(blind(n), color="grey", linestyle=style)

    for axis, title, x in (
            (pass_1, f"pass@1 (star: cross-entropy's best pass@{N})", "epoch"),
            (pass_N, f"pass@{N} (star: cross-entropy's best)", "epoch"),
            (confidence, "confidence (solid: test, dotted: train)", "epoch"),
            (histogram, "confidence at the end", "confidence in the greedy answer"),
            (tries, "pass@N against N", "tries N"),
            (temperature, f"pass@{N} by temperature", "sampling temperature T")):
        axis.set(title=title, xlabel=x, ylabel="share of test problems")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
    confidence.set(ylabel="mean probability of the greedy answer", ylim=(0, 1))
    tries.set_xscale("log", base=2)
    tries.set_xticks(ticks := [n for n in COLUMNS if n in measured], ticks)
    handles, names = tries.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    seeds = max(map(len, groups.values()))
    if seeds > 1:
        figure.supxlabel(f"lines: mean over {seeds} seeds; bands: ± one standard error", fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def frontier(groups, task, N, path):
    """Which N to train with for which N in the test: a table of the runs' ends with the best of each column, and the
    figure. For proofs also an ensemble of the runs, and what is best for which shape of theorem."""
    tries = [n for n in measured_tries(groups) if n in TRIES]
    colors = [COLORS["ce"], "#E69F00", COLORS["limited"], COLORS["coverage"]]
    styles = dict(zip(labels_of(groups).values(), zip(colors, "o^sD")))
    ends = {name: np.array([[run["history"][-1]["test"][f"pass@{n}"] for n in tries] for run in runs])  # (seeds, tries)
            for name, runs in zip(styles, groups.values())}
    shown = [i for i, n in enumerate(tries) if n in COLUMNS]
    columns = [f"pass@{tries[i]}" for i in shown]
    means = np.array([values.mean(axis=0)[shown] for values in ends.values()])  # (trained with, tested with)
    rivals = {name: np.array([[*map(blind, tries)]]) for name, blind in blind_rivals(task, groups).items()}
    if task.searches:
        teams = [torch.tensor([run["problems"]["p"] for run in team]).double() for team in zip(*groups.values())]
        rivals["ensemble"] = np.array([[ensemble_pass_at_n(team, n).mean() for n in tries] for team in teams])
    print_rows(columns, {f"trained with {name}": values[:, shown] for name, values in ends.items()}
               | {name: values[:, shown] for name, values in rivals.items()})
    print("Best " + ", ".join(f"at {column}: {[*ends][i]}" for column, i in zip(columns, means.argmax(axis=0))))

    others = SHAPES if task.searches else {}
    figure = plt.figure(figsize=(7.5 + 4 * len(others), 4.4), layout="constrained")
    curves, *others = figure.subplots(1, 1 + len(others), squeeze=False)[0]
    for name, values in ends.items():
        color, marker = styles[name]
        curves.errorbar(tries, *mean_and_error(values), color=color, marker=marker, label=name, capsize=2)
    best = [[at(run, N, "best epoch")[f"pass@{n}"] for n in tries] for run in next(iter(groups.values()))]
    curves.errorbar(tries, *mean_and_error(best), color=COLORS["ce"], linestyle="--", label="cross-entropy, best epoch")
    for (name, values), style in zip(rivals.items(), (":", "--", "-.")):
        color, style = ("black", "-") if name == "ensemble" else ("grey", style)
        curves.errorbar(tries, *mean_and_error(values), color=color, linestyle=style, label=name)
    curves.set_xscale("log", base=2)
    curves.set_xticks([tries[i] for i in shown], [tries[i] for i in shown])
    curves.set(title="pass@N at the end of training", xlabel="tries N in the test", ylabel="share of test problems",
               ylim=(0, 1))
    for axis, shape in zip(others, SHAPES):
        by_shape(groups, styles, shape, N, axis)
    for axis in (curves, *others):
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*curves.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def ensemble_pass_at_n(p, N):
    """pass@N of each problem where N tries are split evenly among K models: 1 - Π_k (1 - p_k)^(N/K). p: (K, P), their
    success probabilities; returns (P,), nan where N is less than K."""
    K = len(p)
    return pass_at_n(1 - (1 - p).prod(dim=0), N / K) if N >= K else torch.full(p.shape[1:], torch.nan)


# The shapes of proofs: the number of tactics in the shortest, and how many tactics apply along it, on average.
SHAPES = {"length": (0, 7, 9, 11, math.inf), "branching": (0, 1.8, 2, 2.2, math.inf)}


def by_shape(groups, styles, shape, N, axis):
    """pass@N of the theorems between each two edges of a shape: printed as a table, and drawn on an axis."""
    edges = SHAPES[shape]
    bins = [f"below {edges[1]}", *(f"{a} to {b}" for a, b in zip(edges[1:], edges[2:-1])), f"from {edges[-2]}"]
    values = defaultdict(list)  # {name: for each seed, pass@N by bin}
    for team in zip(*groups.values()):  # the runs of one seed
        problems = team[0]["problems"]
        p = torch.tensor([run["problems"]["p"] for run in team]).double()
        solved = dict(zip(styles, pass_at_n(p, N))) | {"ensemble": ensemble_pass_at_n(p, N),
                                                      "blind search": pass_at_n(problems["blind"], N)}
        place = np.digitize(problems[shape], edges) - 1
        for name, share in solved.items():
            values[name].append([share[place == i].mean() for i in range(len(bins))])
    print(f"\npass@{N} by the proof's {shape}:")
    print_rows(bins, values)
    means = np.array([mean_and_error(values[name])[0] for name in styles])
    print("Best, " + ", ".join(f"{name}: {[*styles][i]}" for name, i in zip(bins, means.argmax(axis=0))))
    for name in values:
        color, marker = styles.get(name, ("black" if name == "ensemble" else "grey", ""))
        axis.errorbar(bins, *mean_and_error(values[name]), color=color, marker=marker, capsize=2,
                      linestyle=":" if name == "blind search" else "-")
    axis.set(title=f"pass@{N} by the proof's {shape}", ylim=(0, 1), ylabel="share of these theorems",
             xlabel={"length": "tactics in the shortest proof",
                     "branching": "tactics that apply, mean along that proof"}[shape])


def theory(groups, N, file):
    """The demo: the figure's four panels in the order of the argument, and two tables. Trains no network."""
    a, K = 0.1, 500  # the one-parameter picture's
    p = 1 / np.arange(1, 101) ** 1.2  # one uncertain question: 100 answers, the r-th likeliest with p ~ r^-1.2
    p /= p.sum()
    print(f"The best confidence in an answer that is right with probability {a}, among {K}:")
    print_rows([f"N={n}" for n in COLUMNS], {"best c": [[best_confidence(n, a, K) for n in COLUMNS]]})
    print("\npass@N of policies over 100 answers of probabilities p ~ 1/rank^1.2:")
    policies = {"q = p (cross-entropy tends here)": p, f"the limited loss, N={N}, tends here": limited_policy(p, N)}
    policies |= {f"the optimum for N={n} (the coverage loss)": optimal_policy(p, n) for n in COLUMNS}
    print_rows([f"pass@{n}" for n in COLUMNS],
               {name: [[float(p @ pass_at_n(q, n).numpy()) for n in COLUMNS]] for name, q in policies.items()})

    colors = dict(zip(COLUMNS, ["#000000", "#E69F00", "#0072B2", "#009E73"]))
    figure, ((factor, ranked), (confidence, steps)) = plt.subplots(2, 2, figsize=(12, 8.6), layout="constrained")
    ps = np.logspace(-5, 0, 400)[:-1]
    for n, color in colors.items():
        factor.plot(ps, overconfidence_factor(torch.tensor(np.log(ps)), n), color=color, label=f"N = {n}")
        factor.axvline(1 / n, color=color, linestyle=":")
    factor.set(title="(a) An example stops pulling near p = 1/N (dotted)", xscale="log", ylim=(0, 1.05),
               xlabel="p, probability that one try is right", ylabel="overconfidence factor F(N, p)")
    factor.legend(frameon=False, loc="lower left")

    ranks = np.arange(1, len(p) + 1)
    for name, q, color, style in (("cross-entropy: q = p", p, COLORS["ce"], "-"),
                                  ("limited loss", limited_policy(p, N), COLORS["limited"], "--"),
                                  ("coverage loss, best for pass@N", optimal_policy(p, N), COLORS["coverage"], "-.")):
        ranked.plot(ranks[q > 0], q[q > 0], color=color, linestyle=style, label=name)
    ranked.axhline(1 / N, color="grey", linestyle=":")
    ranked.text(100, 1.08 / N, f"1/N = 1/{N}", color="grey", ha="right")
    ranked.set(title=f"(b) Where the losses tend on an uncertain question, N = {N}", xscale="log", yscale="log",
               xlabel="answer, by rank", ylabel="probability q given to the answer")
    ranked.legend(frameon=False, loc="lower left")

    cs = np.concatenate([np.logspace(math.log10(1 / K), -0.01, 300), 1 - np.logspace(-2, -6, 30)])
    for n, color in colors.items():
        best = best_confidence(n, a, K)
        top = confident_pass_at_n(best, n, a, K)
        confidence.plot(cs, confident_pass_at_n(cs, n, a, K), color=color)
        confidence.plot(best, top, "o", color=color, markeredgecolor="white", markersize=9)
        confidence.annotate(f"N = {n}", (best, top), {1: (0, -18), 8: (-34, 3)}.get(n, (0, 8)), color=color, ha="center",
                            textcoords="offset points")
    for (loss, n, _), runs in groups.items():
        if n in (1, N) and all(f"pass@{N}" in run["history"][0]["test"] for run in runs):
            path_c, path_pass = (curve(runs, lambda record: record["test"][key])[1]
                                 for key in ("confidence", f"pass@{N}"))
            confidence.plot(path_c[1:], path_pass[1:], ".--",  # but for epoch 0, before any training
                            color=COLORS.get(loss, "grey"), linewidth=1, label=f"trained: {name_of(loss, n)}, pass@{N}")
        confidence.legend(frameon=False, loc="upper left")
    confidence.set(title="(c) The best confidence (dots) falls as N grows", xscale="log", xlim=(1 / K, 1.5), ylim=(0, 1.1),
                   xlabel=f"confidence c in a favourite that is right with probability {a}", ylabel="pass@N")

    random = np.random.default_rng(0)
    labels = random.choice(len(p), size=50, p=p)  # 50 problems alike, one sampled label each: the training set
    weights = F.one_hot(torch.from_numpy(labels), len(p)).double()
    population = torch.from_numpy(p)
    for loss, width in zip(LOSSES, (2, 2, 6)):  # every label starts alike, so the limited and coverage losses coincide
        path = [(pass_at_n(q, N) @ population).mean() for q in descend(weights, loss, N, 500, 1.0)]
        steps.plot(path, color=COLORS[loss], linewidth=width, alpha=1 if width == 2 else 0.4, label=name_of(loss, N))
    steps.set(title="(d) No network: bare logits, one sampled label a problem", xscale="symlog", ylim=(0, 1),
              xlabel="step of gradient descent", ylabel=f"pass@{N} on fresh labels")
    steps.legend(frameon=False, loc="lower left")
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


# ==========================================================================================================
# 8. Command line
# ==========================================================================================================

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--task", choices=TASKS, default="multiply")
    parser.add_argument("--loss", choices=["both", "all", *LOSSES], default="both")
    parser.add_argument("--N", type=whole(1), help="tries: the limited loss trains for this pass@N, 64 if not given; "
                        "with --task prove it is for each tactic, 4 if not given")
    parser.add_argument("--epochs", type=whole(0), help="default: the task's own, in SETTINGS")
    parser.add_argument("--traces", type=whole(1, 100_000), help="--task cot: sampled to estimate each p")
    parser.add_argument("--interval", type=whole(1), help="--task cot: epochs from one estimate to the next")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--seeds", type=whole(1, 1000), default=1, help="train this many seeds, from --seed on")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--out", default="out", help="the folder for runs and figures")
    parser.add_argument("--math-dir", help="the MATH dataset's folder; without it, the datasets package fetches it")
    parser.add_argument("--frontier", action="store_true",
                        help="train with N = 1, 8, 64 and 512 (--task prove: 1, 2, 4 and 8), and compare")
    parser.add_argument("--theory", action="store_true", help="train nothing: draw why each loss does what it does")
    args = parser.parse_args(argv)
    if args.task != "cot" and (args.traces or args.interval):
        fail(f"--traces and --interval are for --task cot, whose p is estimated; leave them out for --task {args.task}")
    if args.task == "cot" and args.loss == "coverage":
        fail("the coverage loss needs p itself, which --task cot only estimates: use --loss ce or limited")
    device = choose_device(args.device)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        fail(f"cannot write to --out {out} ({error.strerror}): give a folder that you may write to")

    N = args.N or SETTINGS[args.task]["N"]
    if args.theory:
        theory(load_runs(out, args.task), N, out / "theory.png")
        present(out / "theory.png")
        return 0

    changes = {key: getattr(args, key) for key in ("epochs", "traces", "interval") if getattr(args, key) is not None}
    losses = {"both": ["ce", "limited"], "all": ["ce", "limited"] if args.task == "cot" else [*LOSSES]}
    recipes = [(loss, N) for loss in losses.get(args.loss, [args.loss])]
    if args.frontier:
        recipes = [("limited" if n > 1 else "ce", n) for n in ((1, 2, 4, 8) if args.task == "prove" else COLUMNS)]
    seeds, interrupted, model = range(args.seed, args.seed + args.seeds), False, None
    try:
        for seed in seeds:
            task = build(args.task, seed, args.math_dir)
            for loss, n in recipes:
                path = out / f"{task.name}-{loss}-N{1 if loss == 'ce' else n}-seed{seed}.json"
                run, model = train(task, loss, n, seed, device, path, **changes)
                print(f"{name_of(loss, run['N'])}, seed {seed}: {run['history'][-1]['seconds']:.0f} s, "
                      f"{run['tokens_per_second']:,} training tokens per second, saved in {path}")
    except KeyboardInterrupt:
        interrupted = True
        print(f"\nInterrupted; what was measured until then is kept in {out}", file=sys.stderr)
    except OSError as error:
        fail(f"cannot write to --out {out} ({error.strerror}): make room there; what was saved before is kept")

    groups = load_runs(out, args.task)
    if groups:
        goal, measured = aim(args.task, N), measured_tries(groups, everywhere=True)
        N = min(measured, key=lambda n: abs(math.log(n / goal)))  # where some run lacks that pass@N, the nearest
        if args.frontier and not interrupted:
            epochs = changes.get("epochs", SETTINGS[args.task]["epochs"])
            ends = {key: [run for run in groups[key] if run["seed"] in seeds]  # every N with the same seeds
                    for key in ((loss, n, epochs) for loss, n in recipes)}
            frontier(ends, task, N, out / f"{task.name}-frontier.png")
            present(out / f"{task.name}-frontier.png")
        print_table(groups, task, N)
        print(in_words(groups, N))
        draw(groups, task, N, out / f"{task.name}.png")
        present(out / f"{task.name}.png")
    if model is not None and task.final:
        print_trace(model, task)
    if model is not None and task.searches:
        print_proof(model, task)
    return 130 if interrupted else 0


def build(name, seed, math_dir):
    try:
        return TASKS[name](seed, math_dir) if name == "math" else TASKS[name](seed)
    except (OSError, ValueError) as error:
        fail(error)


def present(path):
    """Say where a figure is; in a notebook, show it."""
    print(f"Figure: {path}")
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display
        display(Image(path))


def choose_device(name):
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device in available if available[device])
    if not available[name]:
        fail(f"--device {name}: this machine has none that PyTorch can use; try --device auto")
    return name


def whole(minimum, maximum=1_000_000):
    def parse(text):
        if text.isdecimal() and len(text) < 10 and minimum <= int(text) <= maximum:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number from {minimum} to {maximum:,}")
    return parse


def fail(message):
    print(f"passn.py: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    sys.exit(main())
