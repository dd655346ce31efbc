"""Train a model to be right in any of N tries, not in the first (arXiv 2502.07154), on one page.
python exercises/one_page.py --loss ce: pass@64 rises, then falls; --loss limited: it stays."""
import argparse
import random
import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--loss", choices=["ce", "limited"], default="limited")
parser.add_argument("--N", type=int, default=64)
parser.add_argument("--epochs", type=int, default=80)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
random.seed(args.seed)
torch.manual_seed(args.seed)
torch.set_num_threads(1)

# If one try is right with probability p, all of N tries fail with probability (1 - p)^N.
def pass_at_n(p, N):
    return -torch.expm1(N * torch.log1p(-p))  # 1 - (1 - p) ** N, and exact for a tiny p, too
# Cross-entropy asks that the first try be right.
def cross_entropy(log_p, N):
    return -log_p.mean()
# The limited loss asks that any of N tries be right.
def limited(log_p, N):
    p = log_p.double().exp().clamp(max=1 - 1e-12)  # at p = 1 the gradient would be nan
    return -pass_at_n(p, N).log().mean()

# A problem is a text, 37*58=2146. Each pair comes once: no test problem is trained on, not even swapped.
texts = []
for a in range(10, 100):
    for b in range(a, 100):
        left, right = random.sample([a, b], 2)
        text = f"{left}*{right}={a * b:04d}"
        texts.append(["0123456789*=".index(character) for character in text])
random.shuffle(texts)
train, test = torch.tensor(texts[:3000]).split(2000)

# The model is a small GPT: two blocks of attention and MLP, in which no place looks ahead.
width = 64
characters = nn.Embedding(12, width)
places = nn.Embedding(10, width)
block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0, activation="gelu",
                                   norm_first=True, batch_first=True)
blocks = nn.TransformerEncoder(block, 2, nn.LayerNorm(width), enable_nested_tensor=False)
head = nn.Linear(width, 12)
model = nn.ModuleList([characters, places, blocks, head])
def log_p_of_next(texts):
    length = texts.shape[1]
    x = characters(texts) + places.weight[:length]
    mask = nn.Transformer.generate_square_subsequent_mask(length)
    return head(blocks(x, mask)).log_softmax(-1)
# p of an answer is the product over its four digits, each given what stands before it.
def log_p_of(texts):
    log_p = log_p_of_next(texts[:, :-1]).gather(2, texts[:, 1:, None])
    return log_p[:, -4:].sum((1, 2))

# Confidence is the probability of the model's own, greedy answer, right or wrong.
@torch.no_grad()
def report(epoch):
    p = log_p_of(test).exp()
    pass_64 = pass_at_n(p, 64).mean()
    own = test[:, :6]
    for _ in range(4):
        digit = log_p_of_next(own)[:, -1:].argmax(-1)
        own = torch.cat([own, digit], dim=1)
    confidence = log_p_of(own).exp().mean()
    print(f"epoch {epoch} pass@1 {p.mean():.3f} pass@64 {pass_64:.3f} confidence {confidence:.3f}")

# Training is by Adam, at a learning rate that falls to nothing.
optimizer = torch.optim.Adam(model.parameters())
loss_of = {"ce": cross_entropy, "limited": limited}[args.loss]
for epoch in range(args.epochs):
    optimizer.param_groups[0]["lr"] = 4e-3 * (1 - epoch / args.epochs)
    for batch in train[torch.randperm(2000)].split(100):
        loss_of(log_p_of(batch), args.N).backward()
        optimizer.step()
        optimizer.zero_grad()
    if epoch % 5 == 4:
        report(epoch + 1)
