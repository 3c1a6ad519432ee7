"""A small Gemma language model and its tokenizer, trained on text about scenes.

The training text is a scene's caption, with its objects in random order, followed by questions about it. The model
never sees an image, so what it later answers about images must come through the connector.
"""

import json
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, GemmaTokenizer

from raylava.corpus.conversation import ChatTokenizer, TokenizedChat, Turn
from raylava.models.families.gemma import TEMPLATE
from raylava.models.templates import IMAGE_TOKEN
from raylava.toy.corpus import DESCRIBE
from raylava.toy.scenes import QUESTION_TYPES, Scene, caption, draw_question, draw_scene

_CONTROL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", TEMPLATE.open, TEMPLATE.close)
# Questions that require looking an object up in the caption are drawn twice as often as counting.
_QUESTION_KINDS = (*QUESTION_TYPES, "color", "thing", "place", "presence")
_EXCHANGES = 6  # per conversation
_WARMUP_STEPS = 30
_DECAY = 0.3  # fraction of the steps in which the learning rate falls
_TURN_END_WEIGHT = 0.1  # loss weight of the end-of-turn tokens, which are learned long before the answers


@dataclass(frozen=True)
class LanguageSize:
    """Dimensions of the model and length of its training."""

    width: int = 96
    layers: int = 2
    heads: int = 4
    key_value_heads: int = 4  # multi-head as in gemma-7b: with a single shared head, the model learns lookups slowly
    vocabulary: int = 640
    steps: int = 650
    batch: int = 32
    lr: float = 3e-3


def build_language_model(folder: Path, size: LanguageSize, seed: int, advance: Callable[[], None]) -> None:
    """Train tokenizer and model and save both as a Hugging Face folder. Calls `advance` after each training step."""
    tokenizer = train_tokenizer(size.vocabulary, seed)
    torch.manual_seed(seed)
    model = GemmaForCausalLM(_config(size, tokenizer))
    _train(model, tokenizer, size, np.random.default_rng(seed), advance)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(vocabulary: int, seed: int) -> GemmaTokenizer:
    """Train a byte-fallback BPE tokenizer like Gemma's on text about scenes; other text becomes characters."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*_CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=[*string.ascii_letters, *string.digits, *string.punctuation, "▁", "\n"],
        show_progress=False,
    )
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Punctuation()]
    )
    bpe.train_from_iterator(_sentences(np.random.default_rng(seed), 2000), trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer = GemmaTokenizer(vocab=trained["vocab"], merges=merges, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [TEMPLATE.open, TEMPLATE.close]})
    return tokenizer


def _sentences(rng: np.random.Generator, count: int) -> Iterator[str]:
    for _ in range(count):
        scene = draw_scene(rng)
        yield f"user model {DESCRIBE} {caption(scene)}"
        yield _labels(scene, rng)
        for kind in QUESTION_TYPES:
            question = draw_question(scene, kind, rng)
            yield f"{question.text} {question.answer}"
            yield question.answer
            yield caption(scene)


def _config(size: LanguageSize, tokenizer: GemmaTokenizer) -> GemmaConfig:
    return GemmaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=size.width,
        intermediate_size=2 * size.width,  # its task is to look things up, which is the attention's part
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.width // size.heads,
        max_position_embeddings=1024,
        initializer_range=size.width**-0.5,  # with Gemma's 0.02, attention of so narrow a model stays flat for long
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _train(
    model: GemmaForCausalLM,
    tokenizer: GemmaTokenizer,
    size: LanguageSize,
    rng: np.random.Generator,
    advance: Callable[[], None],
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, size.steps))
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    chat_tokenizer = ChatTokenizer(tokenizer, TEMPLATE)
    for _ in range(size.steps):
        chats = [chat_tokenizer.encode(_conversation(draw_scene(rng), rng), image_count=0) for _ in range(size.batch)]
        loss = _loss(model, chats)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        advance()


def _lr_factor(step: int, steps: int) -> float:
    """Return a warmup, a long constant part, since lookups are learned late and suddenly, and a linear decay."""
    return min(1.0, (step + 1) / _WARMUP_STEPS, (steps - step) / (_DECAY * steps))


def _conversation(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    questions = [draw_question(scene, kind, rng) for kind in _QUESTION_KINDS]
    exchanges = [*((question.text, question.answer) for question in questions), (DESCRIBE, caption(scene))]
    turns: list[Turn] = []
    for number in rng.permutation(len(exchanges))[:_EXCHANGES]:
        text, answer = exchanges[number]
        turns += [Turn("human", text if turns else f"{_labels(scene, rng)}\n{text}"), Turn("gpt", answer)]
    return turns


def _labels(scene: Scene, rng: np.random.Generator) -> str:
    """Return one word per thing, such as `leftredhouse`, each up to four times, in random order."""
    words = [item.position + item.color + item.thing for item in scene.objects for _ in range(int(rng.integers(1, 5)))]
    return "Labels: " + " ".join(words[index] for index in rng.permutation(len(words)))


def _loss(model: GemmaForCausalLM, chats: list[TokenizedChat]) -> Tensor:
    """Return the weighted mean cross-entropy over the loss spans. Logits are computed at target positions only."""
    longest = max(len(chat.input_ids) for chat in chats)
    ids = torch.zeros(len(chats), longest, dtype=torch.long)
    weights = torch.zeros(len(chats), longest)
    for row, chat in enumerate(chats):
        ids[row, : len(chat.input_ids)] = torch.tensor(chat.input_ids)
        for start, stop in chat.loss_spans:
            weights[row, start : stop - 2] = 1.0
            weights[row, stop - 2 : stop] = _TURN_END_WEIGHT
    targets = weights[:, 1:].nonzero(as_tuple=True)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[targets]
    losses = nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][targets], reduction="none")
    target_weights = weights[:, 1:][targets]
    return (losses * target_weights).sum() / target_weights.sum()
