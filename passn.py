"""pass@N, and a loss that trains for it: cross-entropy makes a model overconfident, overconfidence wastes tries,
and one changed line in the loss mends it.

A small, complete reimplementation of Chen, Raventós, Cheng, Ganguli and Druckmann, "Rethinking Fine-Tuning when
Scaling Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning" (arXiv 2502.07154). Read it from
top to bottom, or run it:

    python passn.py                          # train with both losses and draw what happens
    python passn.py --loss limited --N 64    # one run
"""

import argparse
import copy
import functools
import json
import math
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else PyTorch's threads fight with whatever else is running

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from toy_tasks import END, NO_TOKEN, PAD, TASKS, language_model, part_of, proof_p, show_proof

# ==== 1. pass@N ===========================================================================================
#
# A model answers a problem by sampling. Let p be the probability that one sample is right. Give it N tries and
# count the problem as solved if any of them is right: it fails only if all N fail.


def pass_at_n(p, N):
    """pass@N = 1 - (1 - p)^N of each problem, exactly, for success probabilities p (a number or any shape).

    Returns float64 of the same shape. By way of log(1 - p), so that p = 1e-12 and N = 1,000,000 lose no digit."""
    p = torch.as_tensor(p, dtype=torch.float64)
    return -torch.expm1(N * torch.log1p(-p))


def estimate_pass_at_n(num_samples, num_correct, N):
    """Unbiased estimate of pass@N from n samples of which c were right, for when p itself cannot be had.

    1 - C(n - c, N) / C(n, N): the share of all choices of N among the n samples that hold a right one, here as the
    product 1 - Π_{j<c} (1 - N / (n - j)). (Putting c / n for p into the formula above would be biased.)
    num_correct: a number or a tensor of any shape, from 0 to n. Returns float64 of that shape, on the CPU. Raises
    ValueError where N > n or c > n. Source: Chen et al. 2021, arXiv 2107.03374."""
    if not 1 <= N <= num_samples:
        raise ValueError(f"pass@{N} cannot be estimated from {num_samples} samples: draw at least N")
    num_correct = torch.as_tensor(num_correct).cpu()
    if ((num_correct < 0) | (num_correct > num_samples)).any():
        raise ValueError(f"of {num_samples} samples, 0 to {num_samples} can be right")
    j = torch.arange(num_samples, dtype=torch.float64)
    all_fail = torch.cumprod((1 - N / (num_samples - j)).clamp(min=0), dim=0)  # [c - 1]: C(n - c, N) / C(n, N)
    all_fail = torch.cat([torch.ones(1, dtype=torch.float64), all_fail])
    return 1 - all_fail[num_correct.long()]


# ==== 2. The loss =========================================================================================
#
# Cross-entropy, -log p, asks for the first try to be right. With N tries the thing to ask for is that any of them
# is: minus the logarithm of pass@N. That is the whole idea. What it changes is seen in the gradient:
#
#     d/dθ [-log(1 - (1 - p)^N)] = F(N, p) · d/dθ [-log p],      F(N, p) = N p (1 - p)^(N-1) / (1 - (1 - p)^N)
#
# by the chain rule, dp = p · d log p. Where p is small, (1 - p)^N is e^(-N p), and F depends on u = N p alone, the
# number of right answers to expect among N: F ≈ u / (e^u - 1). While p is far below 1/N, F is 1, and the example pulls
# as it does under cross-entropy; at p = 1/N it is 0.58, at 5/N it is 0.03: an example that N tries solve stops pulling,
# and the model is not made surer than N tries need. With N = 1, F is 1 everywhere: the loss is cross-entropy itself.


def dco_loss(log_p, N):
    """The limited loss (Direct Coverage Optimization): L_N = -log(1 - (1 - p)^N) of each example, in nats.

    log_p: (B,) log-probabilities of the right answers, each the sum over the answer's tokens. Returns (B,), in the
    dtype of log_p; take the mean and call backward. The loss itself is differentiated, so F comes of autograd (who
    multiplies cross-entropy by F instead must detach F). Good to 1e-5 in float32 and 1e-12 in float64 (relative), with
    a finite gradient, for N from 1 to 1,000,000 and log_p from 0 to -2000, where p itself has long underflowed.
    Raises ValueError for N < 1. Source: arXiv 2502.07154."""
    if N < 1:
        raise ValueError(f"N is the number of tries, 1 or more; got {N}")
    if N == 1:
        return -log_p  # cross-entropy
    x = in_float64(log_p)  # N log(1 - p) loses digits in float32
    log_fail = N * log1mexp(x.clamp(-50, -1e-30))  # log (1 - p)^N
    few = -x - math.log(N)  # where p < e^-50, 1 - (1 - p)^N is N p to the last digit
    return torch.where(x < -50, few, -log1mexp(log_fail)).to(log_p)


def in_float64(x):
    return (x.cpu() if x.device.type == "mps" else x).double()  # Apple's GPUs have no float64


def log1mexp(x):
    """log(1 - e^x) for x < 0, by whichever of two forms does not cancel (Mächler 2012). The clamps keep the form
    that is not chosen finite, since autograd multiplies its gradient by 0, and 0 · inf is nan."""
    edge = -math.log(2)
    return torch.where(x > edge, torch.log(-torch.expm1(x.clamp(min=edge))),
                       torch.log1p(-torch.exp(x.clamp(max=edge))))


def overconfidence_factor(log_p, N):
    """F(N, p) = N p (1 - p)^(N-1) / (1 - (1 - p)^N) of each example, between 0 and 1: what is left of cross-entropy's
    gradient under the limited loss, F = -d L_N / d log p. log_p: (B,); returns (B,), precise as `dco_loss` is.

    Training needs it only where p is an estimate: there it weights cross-entropy (see `Traces`)."""
    if N == 1:
        return torch.ones_like(log_p)
    x = in_float64(log_p)
    log_p_fail = log1mexp(x.clamp(-50, -1e-30))
    log_factor = math.log(N) + x + (N - 1) * log_p_fail - log1mexp(N * log_p_fail)
    return torch.where(x < -50, torch.ones_like(x), log_factor.exp()).to(log_p)


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

# ==== 3. A small GPT ======================================================================================
#
# The usual decoder: token and position embeddings, blocks of attention and MLP, logits for the next token. Attention is
# written out, since for texts this short that is faster than PyTorch's own. Two more things are for speed and change no
# number. `last`: where only the last few logits are wanted (the answer's), the last block computes only those. `cache`:
# in sampling, the keys and values of past positions are kept, not computed anew.


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
                nn.init.normal_(parameter, std=0.03)  # a little more than GPT-2's, for a smaller model
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


@torch.no_grad()
def sample(model, prompts, num_new_tokens, temperature=1.0, generator=None):
    """Continue prompts (B, T) by sampling each next token from softmax(logits / temperature), greedily at
    temperature 0. Returns the (B, num_new_tokens) new tokens."""
    chunk = 1024 if prompts.device.type == "cpu" else 16384  # on a CPU a larger cache is waited for
    cache = torch.empty(model.n_layer, 2, min(len(prompts), chunk), model.n_head, prompts.shape[1] + num_new_tokens,
                        model.n_embd // model.n_head, device=prompts.device)  # keys and values
    texts = []
    for tokens in prompts.split(chunk):
        texts.append(tokens[:, :0])
        for _ in range(num_new_tokens):
            start = prompts.shape[1] + texts[-1].shape[1] - tokens.shape[1]  # these are in the cache
            logits = model(tokens, last=1, cache=cache[:, :, :len(tokens)], start=start)[:, 0]
            if temperature == 0:
                tokens = logits.argmax(dim=-1, keepdim=True)
            else:
                tokens = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
            texts[-1] = torch.cat([texts[-1], tokens], dim=1)
    return torch.cat(texts)


# ==== 4. Kinds of answers =================================================================================
#
# Training needs log p of each example, measuring needs p of each test problem, and how to have them depends on what
# an answer is. All that depends on it stands here, in a class for each kind; the rest of this file knows no kind. Who
# adds a kind writes such a class; who adds a task writes its function in toy_tasks.py, for `TASKS`, and its `SETTINGS`.

TRIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # pass@N is measured for these N, and for the run's own
COLUMNS = (1, 8, 64, 512)  # and shown for these
TEMPERATURES = (1.0, 0.7, 1.3, 1.6, 2.0, 2.5)


class Answers:
    """Short, and right in one form: one pass over prompt and answer gives p(y|x) = Π_t p(y_t | x, y_<t), and pass@N
    follows for every N without sampling. Dividing the logits by T before the softmax gives, from the same pass, what
    sampling at temperature T would reach."""
    losses = None  # those that can be had, if not all
    frontier = COLUMNS  # the N that --frontier trains with
    goal = None  # the number of tries in the test that training aims at, where that is not N
    shapes = ()  # what else is known of each test problem, for the run's file
    pad, piece, every = PAD, 1000, 1  # behind answers; measured at once; confidence is of every 1st test problem

    def __init__(self, task, settings, seed, device):
        self.task, self.settings, self.device = task, settings, device
        self.size = len(task.train[0])  # the number of training examples
        self.shown = torch.arange(self.size)[:500]  # those of them that are measured
        self.generator = torch.Generator(device).manual_seed(seed)

    def new_model(self):
        s = self.settings
        return GPT(len(self.task.vocab), self.task.length, s["n_layer"], s["n_head"], s["n_embd"])

    def batches(self, generator):
        """An epoch's batches: the numbers of all training examples in a random order, batch_size at a time."""
        return torch.randperm(self.size, generator=generator).split(self.settings["batch_size"])

    def new_epoch(self, model, epoch, loss, N):
        """What must be done before an epoch."""

    def right(self, model, split, problems):
        """The right answers (B, A) of problems, given by their numbers, and the logits that predict their tokens."""
        x, y, *allowed = (tensor[problems].to(self.device) for tensor in getattr(self.task, split))
        return answer_logits(model, x, y, *allowed), y

    def greedy(self, model, split, problems):
        """The model's own greedy answers to problems (B, A), and the logits that predict their tokens."""
        x, y = (tensor[problems].to(self.device) for tensor in getattr(self.task, split))
        y = until_end(sample(model, x, y.shape[1], temperature=0), END, self.pad)
        return answer_logits(model, x, y), y

    def log_p(self, model, batch):
        """log p of a batch (B,) of numbers of training examples: (B,), to be differentiated."""
        return answer_log_p(*self.right(model, "train", batch), pad=self.pad)

    def objective(self, model, batch, loss, N):
        """The number that training minimizes."""
        return LOSSES[loss](self.log_p(model, batch), N)

    @torch.no_grad()
    def measure(self, model, split, temperatures):
        """{temperature: (p, confidence, number of samples)} of the test problems, or (split "train") of some training
        problems. p and confidence: (P,) float64 on the CPU, the probability that a sample is right, and that it is the
        model's own greedy answer; exact, and the number None, or the shares among that number of samples."""
        problems, values = self.shown if split == "train" else torch.arange(len(self.task.test[0])), []
        for answers, some in ((self.right, problems), (self.greedy, problems[::self.every if split == "test" else 1])):
            log_p = [[answer_log_p(logits, y, T, self.pad) for T in temperatures]
                     for logits, y in (answers(model, split, piece) for piece in some.split(self.piece))]
            values.append([torch.cat(parts).cpu().double().exp() for parts in zip(*log_p)])
        return {T: (*both, None) for T, *both in zip(temperatures, *values)}

    def rivals(self):
        """{name: N -> pass@N} of rivals that learn nothing of the single problem: here, guessers who never read the
        question. They know how often each answer is right in training, p, and sample from a policy."""
        policies = {"blind, training frequencies": lambda p, N: p, "blind, optimal": optimal_policy,
                    "blind, where the limited loss tends": limited_policy} if self.task.guesses is not None else {}
        return {name: functools.partial(blind_pass_at_n, self.task, policy) for name, policy in policies.items()}

    def example(self, model):
        """Something that the model did, as text, to print at the end."""
        return ""


def answer_logits(model, prompts, answers, allowed=None):
    """The logits (B, A, vocab_size) that predict the answers' tokens, each with the right ones before it. Where allowed
    (B, vocab_size) is given, no other token gets any probability."""
    logits = model(torch.cat([prompts, answers[:, :-1]], dim=1), last=answers.shape[1])
    return logits if allowed is None else logits.masked_fill(~allowed[:, None], -torch.inf)


def answer_log_p(logits, answers, temperature=1.0, pad=PAD):
    """log p(y|x) = Σ_t log p(y_t | x, y_<t): (B,), from `answer_logits`. Padding behind the answers counts nothing."""
    logits = logits if temperature == 1 else logits / temperature
    return -F.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=pad,
                            reduction="none").view(answers.shape).sum(dim=1)


def until_end(sampled, end, pad):
    """Sampled tokens (B, A), padded behind the first end: what comes there is no answer any more."""
    is_end = sampled == end
    return sampled.masked_fill(is_end.cumsum(dim=1) - is_end.long() > 0, pad)


def blind_pass_at_n(task, policy, N):
    """The test set's pass@N of a guesser who samples from policy(p, N), p the answers' frequencies in training."""
    q = torch.as_tensor(policy(task.guesses.numpy(), N))
    return pass_at_n(torch.where(task.test_guess >= 0, q[task.test_guess], 0.0), N).mean().item()


class Pretrained(Answers):
    """Answers of a language model that has read before, in its own tokens. A question is read once, by the model as it
    came, and what its layers keep of it for later tokens, keys and values, is stored. Trained are the upper `n_layer`
    layers, where they write the answer: so a step costs no more than the answers' few tokens. Problems come in the
    order of their length, and a batch's questions are of about equal length, for they are padded in front."""
    pad, piece, every = NO_TOKEN, 50, 5

    def __init__(self, task, settings, seed, device):
        self.task, self.settings, self.device, self.size = task, settings, device, len(task.train[0])
        self.shown, self.read, self.prompt_caches = torch.arange(self.size)[::max(1, self.size // 100)], {}, {}
        for split, (prompts, y) in (("train", task.train), ("test", task.test)):
            texts = tuple(x + tuple(answer) for x, answer in zip(prompts, y[:, :-1].clamp(min=0).tolist()))
            self.read[split] = read(task.model, settings["n_layer"], device, texts, y.shape[1])

    def new_model(self):
        model = copy.deepcopy(language_model(self.task.model)[0]).requires_grad_(False)
        model.model.layers[-self.settings["n_layer"]:].float().requires_grad_(True)
        return model

    def batches(self, generator):
        order = torch.arange(self.size) + 0.1 * self.size * torch.rand(self.size, generator=generator)
        batches = order.argsort().split(self.settings["batch_size"])
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    def right(self, model, split, problems):
        from transformers import DynamicCache
        y = getattr(self.task, split)[1][problems].to(self.device)
        states, kept = zip(*(self.read[split][i] for i in problems))
        lengths, x = torch.tensor([k.shape[-2] for k in kept], device=y.device)[:, None], torch.stack(states).float()
        T, places = lengths.max().item(), torch.arange(y.shape[1], device=y.device)
        keys_at = torch.arange(-T, y.shape[1], device=y.device)
        unseen = (keys_at < -lengths)[:, None, None] | (keys_at > places[:, None])  # padding and the future, (B, 1, A, T + A)
        mask = torch.where(unseen, -torch.inf, 0.0)
        with mixed_precision(model):
            cache, rotary = DynamicCache(), model.model.rotary_emb(x, lengths + places)
            kept = torch.stack([F.pad(k, (0, 0, T - k.shape[-2], 0)) for k in kept], dim=2).to(model.dtype)
            for layer, (keys, values) in zip(model.model.layers[-len(kept):], kept):
                cache.update(keys, values, layer.self_attn.layer_idx)
                x = layer(x, attention_mask=mask, position_embeddings=rotary, past_key_values=cache)
            return model.lm_head(model.model.norm(x)).float(), y

    def greedy(self, model, split, problems):  # in transformers' own loop
        (prompts, y), (original, tokenizer) = getattr(self.task, split), language_model(self.task.model)
        x = [torch.tensor(prompts[i][::-1], device=self.device) for i in problems]
        x = nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=NO_TOKEN).flip(1)  # padded in front
        mask, end, key = (x != NO_TOKEN).long(), tokenizer.eos_token_id, (split, problems[0].item())
        with mixed_precision(model):
            if key not in self.prompt_caches:  # of all but a prompt's last token
                positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
                out = original.model(x[:, :-1].clamp(min=0), mask[:, :-1], positions[:, :-1])
                self.prompt_caches[key] = out.past_key_values
            out = model.generate(x.clamp(min=0), attention_mask=mask, do_sample=False, max_new_tokens=y.shape[1],
                                 past_key_values=copy.deepcopy(self.prompt_caches[key]), eos_token_id=end,
                                 pad_token_id=end, output_logits=True, return_dict_in_generate=True)
        return torch.stack(out.logits, dim=1).float(), until_end(out.sequences[:, x.shape[1]:], end, NO_TOKEN)


@functools.lru_cache(2)  # of the training problems and the test's: the same for every loss and seed
@torch.no_grad()
def read(name, num_trained, device, texts, A):
    """What a language model, as it came, makes of texts whose last A places are the answer's: there the states before
    its last num_trained layers, (A, C), and before that place these layers' keys and values, (num_trained, 2, heads, T,
    head size); in bfloat16."""
    model, result = language_model(name)[0].to(device), []
    for i in tqdm(range(0, len(texts), 32), desc="reading the questions, once"):
        tokens = [torch.tensor(text, device=device) for text in texts[i:i + 32]]
        with mixed_precision(model):
            out = model.model(nn.utils.rnn.pad_sequence(tokens, batch_first=True), output_hidden_states=True)
        for row, text in enumerate(tokens):
            kept = [torch.stack([layer.keys[row, :, :len(text) - A], layer.values[row, :, :len(text) - A]])
                    for layer in out.past_key_values.layers[-num_trained:]]
            states = out.hidden_states[-1 - len(kept)][row, len(text) - A:len(text)].clone()
            result.append((states.bfloat16(), torch.stack(kept).bfloat16()))
    return result


def mixed_precision(model):
    """A model that was loaded in bfloat16 computes in it; the trained layers' weights and the loss stay in float32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)


class Traces(Answers):
    """Reasoning, and then the answer, the last `final` tokens, which alone count. So p is a sum over all traces, too
    many to go through: n traces are sampled, c of them are right, p̂ = c / n, and pass@N is estimated.

    In training, autograd has only the log p of the one trace that is trained on. The limited loss is then the paper's
    approximate one: F(N, p̂) times that trace's cross-entropy, with `traces` traces sampled for each training problem,
    anew every `interval` epochs. With p̂ = 0, F is 1."""
    losses = ("ce", "limited")  # others are not F(N, p̂) times cross-entropy
    samples = {1.0: 128, 1.3: 64}  # traces of each test problem, at each temperature

    def new_epoch(self, model, epoch, loss, N):
        if epoch % self.settings["interval"] == 0:
            self.weights = torch.ones(self.size, device=self.device)
            if loss != "ce":
                x, y = (tensor.to(self.device) for tensor in self.task.train)
                _, right = right_traces(model, x, y, self.task, self.settings["traces"], 1.0, self.generator)
                self.weights = overconfidence_factor(right.float().mean(dim=1).log(), N)

    def objective(self, model, batch, loss, N):
        return LOSSES["ce"](self.weights[batch] * self.log_p(model, batch), N)

    def measure(self, model, split, temperatures):
        x, y = (tensor[:100 if split == "train" else None].to(self.device) for tensor in getattr(self.task, split))
        greedy = sample(model, x, y.shape[1], temperature=0)[:, None, -self.task.final:]
        generator, result = torch.Generator(x.device).manual_seed(0), {}  # the same luck for every model
        for T in filter(self.samples.get, temperatures):
            traces, right = right_traces(model, x, y, self.task, self.samples[T], T, generator)
            sure = (traces[..., -self.task.final:] == greedy).all(dim=2)
            result[T] = *(share.cpu().double().mean(dim=1) for share in (right, sure)), self.samples[T]
        return result

    def example(self, model):
        """A right trace for the first of some test problems that has one among 64 sampled ones."""
        x, y = (tensor[:50].to(self.device) for tensor in self.task.test)
        traces, right = right_traces(model, x, y, self.task, 64, 1.0, self.generator)
        for problem, trace in right.nonzero()[:1]:
            tokens = [*x[problem], *traces[problem, trace]]
            return "A test problem and a right trace: " + "".join(self.task.vocab[token] for token in tokens)
        return ""


def right_traces(model, prompts, answers, task, num_samples, temperature, generator):
    """num_samples traces of each problem (P, num_samples, A), and which of them are right (P, num_samples)."""
    traces = sample(model, prompts.repeat_interleave(num_samples, dim=0), answers.shape[1], temperature, generator)
    traces = traces.view(len(prompts), num_samples, -1)
    return traces, (traces[..., -task.final:] == answers[:, None, -task.final:]).all(dim=2)


class Steps(Answers):
    """The steps of proofs: a state, and the tactic that the known proof uses there. The loss is applied to each, with
    an N for a step, far below the number of attempts, which is what the test counts. A test theorem's p sums over all
    its proofs, exactly. The greedy attempt takes the likeliest tactic in every state, and the confidence is the
    probability of all its choices, whether it proves the theorem or not."""
    frontier, goal, shapes = (1, 2, 4, 8), 64, ("length", "branching", "blind")

    @torch.no_grad()
    def measure(self, model, split, temperatures):
        table = self.task.test if split == "test" else self.task.train_table
        logits, result = tactic_logits(model, table), {}
        for T in temperatures:
            policy = F.softmax(logits / T, dim=-1)
            greedy = policy * F.one_hot(policy.argmax(dim=-1), policy.shape[1])
            result[T] = proof_p(policy, table), proof_p(greedy, table, failure=1.0), None
        return result

    def rivals(self):
        return {"blind search": lambda N: pass_at_n(self.task.test.blind, N).mean().item()}

    @torch.no_grad()
    def example(self, model):
        return show_proof(F.softmax(tactic_logits(model, self.task.test), dim=-1), self.task.test)


class Searches(Steps):
    """Whole attempts at theorems, judged by the kernel; no proof is shown. A theorem has few states, so p, that an
    attempt proves it, is exact and differentiable, and the loss is that of p itself: N is attempts. With N = 1 it is
    -log p, cross-entropy's counterpart, which rewards every proof instead of a given one. Reinforcement learning with
    a verifier estimates this gradient of pass@N from sampled attempts; here it is exact: no baseline, no variance."""
    frontier, goal = COLUMNS, None

    def __init__(self, task, settings, seed, device):
        self.task, self.settings, self.size = task, settings, len(task.train.theorems)
        self.shown = torch.arange(self.size)

    def log_p(self, model, batch):
        table = part_of(self.task.train, batch.tolist())
        return proof_p(F.softmax(tactic_logits(model, table), dim=-1), table).clamp(min=1e-300).log()


def tactic_logits(model, table):
    """The tactics' logits in all states of a `ProofTable`: (S, vocab_size), float64, -inf where one does not apply."""
    prompts = table.prompts.to(model.head.weight.device)
    logits = torch.cat([model(x, last=1)[:, 0] for x in prompts.split(250)])
    return logits.cpu().double().masked_fill(~table.applicable, -torch.inf)


KINDS = {"answers": Answers, "pretrained": Pretrained, "traces": Traces, "steps": Steps, "searches": Searches}

# ==== 5. Training =========================================================================================
#
# One loop for every loss and task. A run is a plain dictionary, saved after every evaluation.

# The same for every loss. N is the limited loss's: for the whole answer, in `prove` for each step. Adam divides a
# gradient by its own recent size, and so undoes what F does where *every* example is nearly solved, as most steps of
# proofs are: there an eps far above the usual one lets small gradients make small steps.
DEFAULTS = dict(N=64, evaluations=12, batch_size=50, weight_decay=0.0, eps=1e-8, n_layer=2, n_head=4, n_embd=64)
SETTINGS = {
    "multiply": DEFAULTS | dict(epochs=60, learning_rate=1e-3, batch_size=100, n_embd=128),
    "cot": DEFAULTS | dict(epochs=80, evaluations=8, learning_rate=3e-3, traces=32, interval=2),
    "prove": DEFAULTS | dict(epochs=40, learning_rate=3e-3, eps=1e-3, N=4),
    "search": DEFAULTS | dict(epochs=8, evaluations=4, learning_rate=3e-3, batch_size=10),
    "math": DEFAULTS | dict(epochs=8, learning_rate=2e-3, n_embd=128),
    "math-lm": dict(model="SmolLM2-135M-Instruct.Q4_1.gguf", N=64, epochs=8, evaluations=8, batch_size=32,
                    learning_rate=5e-4, weight_decay=0.0, eps=1e-8, n_layer=10),  # layers that are trained
}


def train(task, loss="limited", N=None, seed=0, device="cpu", out=None, **changes):
    """Train a new model on a task and measure it as it learns. Returns the run (see the README) and the model.

    With loss "ce" the training N is 1, and the N that is given only another pass@N that is measured. Where a folder
    `out` is given the run is saved there after every evaluation. `changes` are to the task's `SETTINGS`: epochs=10."""
    settings = SETTINGS[task.name] | changes
    goal, epochs = N or settings["N"], settings["epochs"]
    N, tries = 1 if loss == "ce" else goal, sorted({*TRIES, goal})
    torch.manual_seed(seed)  # the same first weights and the same order of examples for every loss
    order, kind = torch.Generator().manual_seed(seed), KINDS[task.kind](task, settings, seed, device)
    model = kind.new_model().to(device)
    num_steps = epochs * math.ceil(kind.size / settings["batch_size"]) or 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["learning_rate"], betas=(0.9, 0.99),
                                  eps=settings["eps"], weight_decay=settings["weight_decay"], fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step:  # up over 5 %, then a cosine down to 0.1
        min(1, 0.01 + step / (0.05 * num_steps)) * (0.55 + 0.45 * math.cos(math.pi * step / num_steps)))

    run = {"task": task.name, "loss": loss, "N": N, "seed": seed, "config": settings | {"N": N, "device": device},
           "rivals": {name: {f"pass@{n}": rival(n) for n in tries} for name, rival in kind.rivals().items()},
           "history": [], "problems": {}}
    start, shown = time.perf_counter(), ("pass@1", f"pass@{kind.goal or goal}", "confidence")
    with tqdm(total=num_steps, desc=f"{task.name} {label_of(run)}, seed {seed}") as bar:
        for epoch in range(epochs + 1):
            kind.new_epoch(model, epoch, loss, N)
            if epoch == epochs or epoch % math.ceil(epochs / settings["evaluations"]) == 0:
                with torch.no_grad():
                    value = kind.objective(model, kind.shown, loss, N).item()
                measured = kind.measure(model, "test", TEMPERATURES)
                tempered = {f"{T:g}": summary(*values, tries) for T, values in measured.items()}
                run["history"].append({"epoch": epoch, "loss": value, "seconds": round(time.perf_counter() - start, 2),
                                       "test": tempered["1"], "tempered": tempered,
                                       "train": summary(*kind.measure(model, "train", [1.0])[1.0], tries)})
                run["problems"] = {"p": measured[1.0][0].tolist(), "confidence": measured[1.0][1].tolist()}
                run["problems"] |= {name: getattr(task.test, name).tolist() for name in kind.shapes}
                if epoch == epochs:
                    run["example"] = kind.example(model)
                if out:
                    save(run, Path(out) / path_of(run))
                bar.set_postfix_str(f"epoch {epoch}, loss {value:.2f}, " + ", ".join(
                    f"{key} {tempered['1'][key]:.3f}" for key in shown if key in tempered["1"]))
            if epoch == epochs:
                break
            for batch in kind.batches(order):
                optimizer.zero_grad()
                kind.objective(model, batch, loss, N).backward()
                optimizer.step()
                scheduler.step()
                bar.update()
    return run, model


def summary(p, confidence, num_samples, tries):
    """{"pass@1": …, "confidence": …, "log_p": …}: means over the problems, of what `measure` gives for one temperature.
    From samples there is no log p, and no pass@N for more tries than samples."""
    if num_samples:
        result = {n: estimate_pass_at_n(num_samples, (p * num_samples).round(), n) for n in tries if n <= num_samples}
    else:
        result = {n: pass_at_n(p, n) for n in tries}
    log_p = {} if num_samples else {"log_p": p.clamp(min=1e-300).log().mean().item()}
    return {f"pass@{n}": x.mean().item() for n, x in result.items()} | {"confidence": confidence.mean().item()} | log_p


def save(run, path):
    """Write a run as JSON, whole or not at all: to a file beside it, *.partial, which then takes its name. There it
    stays, if the run is unfinished and would take the place of a finished one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(run))
    try:
        in_the_way = not is_finished(run) and is_finished(json.loads(path.read_text()))
    except (OSError, ValueError, LookupError, TypeError):  # there is none, or it is broken
        in_the_way = False
    if not in_the_way:
        partial.replace(path)


def is_finished(run):
    return run["history"][-1]["epoch"] == run["config"]["epochs"]


def changes_of(run):
    """The settings in which a run differs from its task's."""
    return [f"{key}={run['config'][key]:{'' if isinstance(value, str) else 'g'}}"
            for key, value in SETTINGS[run["task"]].items() if key != "N" and run["config"][key] != value]


def label_of(run):
    return ", ".join(["cross-entropy" if run["loss"] == "ce" else f"{run['loss']} N={run['N']}", *changes_of(run)])


def path_of(run):
    """The name of a run's file: another one for other settings."""
    return "-".join([run["task"], run["loss"], f"N{run['N']}", *changes_of(run), f"seed{run['seed']}.json"])


# ==== 6. Theory ===========================================================================================
#
# Why does each loss do what it does? Two things separate them. Where a problem has one label, cross-entropy learns it
# by heart, to p = 1, and the limited loss lets go at about 1/N. And where the answer stays uncertain, their optima
# differ. For that, take the network away: let answer y be right with probability p_y (not the p of section 1, which is
# a model's), and let nothing in the question tell more. A policy q over the answers then reaches
# pass@N = Σ_y p_y (1 - (1 - q_y)^N). Which q is best, and where does each loss lead?


def optimal_policy(p, N):
    """The policy q that maximizes pass@N = Σ_i p_i (1 - (1 - q_i)^N) over Σ_i q_i = 1. The coverage loss tends to it:
    over many problems alike, the batch's mean pass@N is this sum, and the logarithm moves no maximum.

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


# ==== 7. Tables and figures ===============================================================================
#
# All from the saved runs; nothing here is needed to understand the rest.

# Okabe and Ito's colours, which the colour-blind can tell apart.
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "savefig.dpi": 110})
COLORS = {"cross-entropy": "#D55E00", "limited N=64": "#0072B2", "coverage N=64": "#009E73"}
MORE_COLORS = ["#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def load_runs(out, task_name):
    """The task's finished runs in a folder, those of equal settings together: {label: [run, …]}."""
    groups = defaultdict(list)
    for path in sorted(Path(out).glob(f"{task_name}-*-seed*.json")):
        try:
            run = json.loads(path.read_text())
            if run["task"] != task_name:  # math's stars also find math-lm's
                continue
            key = run["loss"], run["N"], label_of(run)
            run["history"][-1]["tempered"]["1"], run["problems"]["confidence"], run["rivals"]
            if is_finished(run):
                groups[key].append(run)
            else:
                print(f"left out {path}, which is unfinished: epoch {run['history'][-1]['epoch']}", file=sys.stderr)
        except (OSError, ValueError, LookupError, TypeError) as error:
            print(f"left out {path}, which is no run's file of this version ({error!r}); remove it", file=sys.stderr)
    return {key[-1]: groups[key] for key in sorted(groups)}


def measured_tries(groups):
    """The N, in order, whose pass@N all runs have measured, at every temperature."""
    tests = (test for runs in groups.values() for run in runs for test in run["history"][-1]["tempered"].values())
    return sorted(set.intersection(*({int(key[5:]) for key in test if key.startswith("pass@")} for test in tests)))


def best_epoch(run, N):
    """The test set's measurements in the epoch with the best pass@N: chosen on the test set itself, which flatters."""
    return max((record["test"] for record in run["history"]), key=lambda test: test[f"pass@{N}"])


def pass_at_stages(run, N):
    """pass@N at the end, in the best epoch, and in the best epoch at the best temperature, chosen in the same way."""
    return [run["history"][-1]["test"][f"pass@{N}"], best_epoch(run, N)[f"pass@{N}"],
            max(test[f"pass@{N}"] for record in run["history"] for test in record["tempered"].values())]


def mean_and_error(values):
    """Mean and standard error over the first axis, the seeds; an error of 0 where there is only one."""
    values = np.array(values, dtype=np.float64)
    error = values.std(axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0 * values[0]
    return values.mean(axis=0), error


def rivals_of(groups):
    """{name: [its pass@N by N, for each seed]}, from the group with the most seeds."""
    runs = max(groups.values(), key=len)
    return {name: [run["rivals"][name] for run in runs] for name in runs[0]["rivals"]}


def print_table(groups, N):
    """A row for each loss and setting: the test set's values at the end, and the best pass@N before; then the rivals.
    Mean over the seeds ± standard error."""
    columns = [f"pass@{n}" for n in measured_tries(groups) if n in (*COLUMNS, N)] + ["confidence"]
    rows = {label: [[run["history"][-1]["test"][column] for column in columns] + pass_at_stages(run, N)[1:]
                    for run in runs] for label, runs in groups.items()}
    rows |= {name: [[rival[column] for column in columns[:-1]] for rival in seeds]
             for name, seeds in rivals_of(groups).items()}
    width = max(map(len, rows))
    print(" " * width + "".join(f"{column:>13}" for column in [*columns, "best epoch", "and best T"]))
    for label, values in rows.items():
        cells = [f"{mean:.3f}±{error:.3f}" if len(values) > 1 else f"{mean:.3f}"
                 for mean, error in zip(*mean_and_error(values))]
        print(f"{label:{width}}" + "".join(f"{cell:>13}" for cell in cells))


def in_words(groups, N):
    """In plain sentences: what became of cross-entropy, and how the other losses' ends compare with it."""
    stages = {label: np.mean([pass_at_stages(run, N) for run in runs], axis=0) for label, runs in groups.items()}
    rivals, sentences = [label for label in groups if label.startswith("cross-entropy")], []
    for label, (end, best, _) in stages.items():
        rival = "cross-entropy" + label[len(label.split(",")[0]):]  # of the same settings
        if label in rivals[:1]:
            sentences.append(f"Cross-entropy's pass@{N} is {best:.3f} in its best epoch and {end:.3f} at the end.")
        elif label not in rivals and rival in stages and stages[rival].all():
            versus = zip(("cross-entropy's end", "its best epoch", "its best epoch and temperature"), stages[rival])
            versus = [f"{end / value:.2f} times {name}" for name, value in versus]
            if len(rivals) > 1:
                versus.append(f"{end / max(stages[rival][2] for rival in rivals):.2f} times the best of all its rows")
            sentences.append(f"{label} ends at {end:.3f}: {', '.join(versus)}.")
    return "\n".join(sentences)


def draw(groups, N, path):
    """The main figure: what each loss does to pass@1, pass@N and confidence as training goes on, and at its end."""
    colors, more = {}, iter(MORE_COLORS * 9)
    for label in groups:
        color = COLORS.get(label.split(",")[0])
        colors[label] = next(more) if color in (None, *colors.values()) else color
    measured = [n for n in measured_tries(groups) if n in TRIES]
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.2), layout="constrained")
    (pass_1, pass_N, confidence), (histogram, tries, temperature) = axes

    def line(axis, xs, values, color, **style):  # values: (seeds, xs)
        mean, error = mean_and_error(values)
        axis.plot(xs, mean, color=color, **style)
        axis.fill_between(xs, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)

    for label, runs in groups.items():
        color, histories = colors[label], [run["history"] for run in runs]
        epochs = [record["epoch"] for record in histories[0]]
        temperatures = sorted(histories[0][0]["tempered"], key=float)
        curve = lambda split, key: np.array([[record[split][key] for record in history] for history in histories])
        by_T = np.stack([[[record["tempered"][T][f"pass@{N}"] for T in temperatures] for record in history]
                         for history in histories])  # (seeds, epochs, temperatures)
        for axis, split, key in ((pass_1, "test", "pass@1"), (pass_N, "test", f"pass@{N}"),
                                 (confidence, "test", "confidence"), (confidence, "train", "confidence")):
            line(axis, epochs, curve(split, key), color, linestyle=":" if split == "train" else "-")
        values = np.concatenate([run["problems"]["confidence"] for run in runs])
        histogram.hist(values, bins=np.linspace(0, 1, 26), weights=np.full(len(values), 1 / len(values)),
                       histtype="step", linewidth=1.5, color=color)
        line(tries, measured, np.stack([curve("test", f"pass@{n}")[:, -1] for n in measured], axis=1), color, label=label)
        line(temperature, [*map(float, temperatures)], by_T[:, -1], color, marker="o", markersize=4)
        if label.startswith("cross-entropy") and label == [*groups][0]:
            best = [[best_epoch(run, N)[f"pass@{n}"] for n in measured] for run in runs]
            line(tries, measured, best, color, linestyle="--", label=f"{label}, best epoch")
            line(temperature, [*map(float, temperatures)], by_T.max(axis=1), color, linestyle="--", marker="o",
                 markersize=4)
            star = curve("test", f"pass@{N}").mean(axis=0).argmax()
            for axis, n in ((pass_1, 1), (pass_N, N)):
                axis.plot(epochs[star], curve("test", f"pass@{n}").mean(axis=0)[star], "*", color=color, markersize=15,
                          markeredgecolor="black")

    for (name, seeds), style in zip(rivals_of(groups).items(), (":", "--", "-.")):
        rival = {n: np.mean([values[f"pass@{n}"] for values in seeds]) for n in (*measured, N)}
        tries.plot(measured, [rival[n] for n in measured], color="grey", linestyle=style, label=name)
        for axis, n in ((pass_1, 1), (pass_N, N)):
            axis.axhline(rival[n], color="grey", linestyle=style)

    for axis, title, x in (
            (pass_1, f"pass@1 (star: cross-entropy's best pass@{N})", "epoch"),
            (pass_N, f"pass@{N} (star: cross-entropy's best)", "epoch"),
            (confidence, "confidence (solid: test, dotted: train)", "epoch"),
            (histogram, "confidence at the end", "confidence in the greedy answer"),
            (tries, "pass@N against N", "tries N"),
            (temperature, f"pass@{N} by temperature", "sampling temperature T")):
        axis.set(title=title, xlabel=x, ylabel="share of test problems")
        axis.set_ylim(bottom=0)
    confidence.set(ylabel="mean probability of the greedy answer", ylim=(0, 1))
    tries.set_xscale("log", base=2)
    tries.set_xticks(ticks := [n for n in COLUMNS if n in measured], ticks)
    figure.legend(*tries.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.supxlabel(f"lines: mean over the seeds ({max(map(len, groups.values()))}); bands: ± one standard error",
                     fontsize="medium")
    present(figure, path)


def theory(N, path):
    """The demo: three panels in the order of the argument."""
    colors = dict(zip(COLUMNS, ["#000000", "#E69F00", "#0072B2", "#009E73"]))
    figure, (factor, ranked, confidence) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    p = np.logspace(-5, 0, 400)[:-1]
    for n, color in colors.items():
        factor.plot(p, overconfidence_factor(torch.tensor(np.log(p)), n), color=color, label=f"N = {n}")
        factor.axvline(1 / n, color=color, linestyle=":")
    factor.set(title="(a) An example stops pulling near p = 1/N (dotted)", xscale="log", ylim=(0, 1.05),
               xlabel="p, probability that one try is right", ylabel="overconfidence factor F(N, p)")
    factor.legend(loc="lower left")

    p = 1 / np.arange(1, 101) ** 1.2  # one uncertain question: 100 answers, the r-th likeliest with p ~ r^-1.2
    p /= p.sum()
    for loss, name, q, style in (("cross-entropy", "cross-entropy: q = p", p, "-"),
                                 ("limited N=64", "limited loss", limited_policy(p, N), "--"),
                                 ("coverage N=64", "coverage loss, best for pass@N", optimal_policy(p, N), "-.")):
        ranked.plot(np.flatnonzero(q) + 1, q[q > 0], color=COLORS[loss], linestyle=style, label=name)
    ranked.axhline(1 / N, color="grey", linestyle=":")
    ranked.text(100, 1.08 / N, f"1/N = 1/{N}", color="grey", ha="right")
    ranked.set(title=f"(b) Where the losses tend if unsure, N = {N}", xscale="log", yscale="log",
               xlabel="answer, by rank", ylabel="probability q given to the answer")
    ranked.legend(loc="lower left")

    a, K = 0.1, 500  # the one-parameter picture's
    c = np.geomspace(1 / K, 1 - 1e-9, 1000)
    for n, color in colors.items():
        best = optimal_policy([a] + [(1 - a) / (K - 1)] * (K - 1), n)[0]  # it treats equal answers equally, as c does
        confidence.plot(c, confident_pass_at_n(c, n, a, K), color=color, label=f"N = {n}")
        confidence.plot(best, confident_pass_at_n(best, n, a, K), "o", color=color, markeredgecolor="white")
    confidence.set(title="(c) The best confidence (dot) falls as N grows", xscale="log", xlim=(1 / K, 1.1),
                   ylim=(0, 1.1), xlabel=f"confidence c in an answer right with probability {a}", ylabel="pass@N")
    confidence.legend(loc="upper left")
    present(figure, path)


def present(figure, path):
    """Save a figure and say where it is; in a notebook, show it."""
    figure.savefig(path)
    plt.close(figure)
    print(f"Figure: {path}")
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display
        display(Image(path))


# ==== 8. Command line =====================================================================================


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--task", choices=TASKS, default="multiply")
    parser.add_argument("--loss", choices=["both", "all", *LOSSES], default="both")
    parser.add_argument("--N", type=int, help="tries that the loss trains for; default 64 (prove: 4, for each step)")
    parser.add_argument("--epochs", type=int, help="default: the task's own, in SETTINGS")
    parser.add_argument("--weight-decay", type=float, help="AdamW's; default 0")
    parser.add_argument("--traces", type=int, help="--task cot: sampled to estimate each p")
    parser.add_argument("--interval", type=int, help="--task cot: epochs from one estimate to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="train this many seeds, from --seed on")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--out", type=Path, default="out", help="the folder for runs and figures")
    parser.add_argument("--math-dir", help="the MATH dataset's folder; without it, the datasets package fetches it")
    parser.add_argument("--model", help="--task math: fine-tune a language model: hub name, folder or .gguf file")
    parser.add_argument("--frontier", action="store_true", help="train with N = 1, 8, 64, 512 (prove: 1, 2, 4, 8)")
    parser.add_argument("--theory", action="store_true", help="train nothing: draw why each loss does what it does")
    args = parser.parse_args(argv)
    lowest = {"N": 1, "epochs": 0, "weight_decay": 0, "traces": 1, "interval": 1, "seed": 0, "seeds": 1}
    for name, low in lowest.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= 1_000_000:
            fail(f"--{name.replace('_', '-')} {value}: give a number from {low} to 1,000,000")
    args.changes = {name: getattr(args, name) for name in ("epochs", "weight_decay", "traces", "interval")
                    if getattr(args, name) is not None}
    if args.model:
        args.changes["model"] = Path(args.model).name
    for name in args.changes.keys() - SETTINGS["math-lm" if args.model and args.task == "math" else args.task].keys():
        fail(f"--{name} is no setting of --task {args.task}; leave it out")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    args.device = next(filter(there.get, there)) if args.device == "auto" else args.device
    if not there[args.device]:
        fail(f"--device {args.device}: this machine has none that PyTorch can use; try --device auto")
    return args


def fail(message):
    print(f"passn.py: {message}", file=sys.stderr)
    sys.exit(2)


def build(args, seed):
    """The task, the (loss, N) to train it with, and the number of tries to show."""
    try:
        task = TASKS[args.task](seed, *[args.math_dir, args.model] * (args.task == "math"))
    except (OSError, ValueError) as error:
        fail(error)
    kind, N = KINDS[task.kind], args.N or SETTINGS[task.name]["N"]
    losses = {"both": ["ce", "limited"], "all": kind.losses or LOSSES}.get(args.loss, [args.loss])
    if kind.losses and args.loss in LOSSES.keys() - kind.losses:
        fail(f"--loss {args.loss} needs p itself, which --task {task.name} only estimates: use --loss ce or limited")
    plan = [(loss, N) for loss in losses]
    if args.frontier:
        plan = [("ce" if N == 1 else "limited", N) for N in kind.frontier]
    return task, plan, kind.goal or N


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):  # no console is too plain for an arrow
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    args, run, status = parse_arguments(argv), None, 0
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.theory:
            theory(args.N or 64, args.out / "theory.png")
            return 0
        try:
            for seed in range(args.seed, args.seed + args.seeds):
                task, plan, goal = build(args, seed)
                for loss, N in plan:
                    run, _ = train(task, loss, N, seed, args.device, args.out, **args.changes)
                    print(f"{run['history'][-1]['seconds']:.0f} s, saved in {args.out / path_of(run)}")
        except KeyboardInterrupt:
            status = 130
            print(f"\nInterrupted; what was measured until then is kept in {args.out}", file=sys.stderr)
        groups = run and load_runs(args.out, run["task"])
        if groups:
            measured = measured_tries(groups)
            N = min(measured, key=lambda n: abs(math.log(n / goal)))  # where some run lacks that pass@N, the nearest
            print_table(groups, N)
            print(in_words(groups, N))
            draw(groups, N, args.out / f"{run['task']}{'-frontier' * args.frontier}.png")
            print(run["example"])
    except OSError as error:
        fail(f"cannot write to --out {args.out} ({error.strerror}): give a folder with room that you may write to; "
             f"what was saved before is kept")
    return status


if __name__ == "__main__":
    sys.exit(main())
