"""What an adapter is good at, from its card: one readable table of skills and their synonyms.

A word of the table is looked for in tags and task names (source ``card``), in dataset ids (source
``dataset``), and as a whole word in the repo's and folder's names, the title and the first
paragraphs (source ``card``). To teach a skill, add a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lorahub_registry.adapters.readme import Card

# skill: words that mean it. A word ending in * also matches its continuations.
SKILLS: dict[str, str] = {
    "code": "code coding coder programming python javascript typescript rust java c++ humaneval "
    "mbpp codealpaca code-generation evol-code evolcode codefeedback the-stack starcoder commit* "
    "magicoder opencoder apps leetcode",
    "sql": "sql text2sql text-to-sql nl2sql spider wikisql sqlcoder text2cypher",
    "math": "math maths mathematics gsm8k metamath* mathinstruct numina* arithmetic algebra aqua "
    "svamp hendrycks_math orca-math",
    "reasoning": "reasoning cot chain-of-thought logic bbh arc strategyqa thinking",
    "chat": "chat chatbot conversational conversation dialogue dialog assistant sharegpt ultrachat "
    "oasst* openassistant dolly airoboros lmsys neural-chat debate* hh-rlhf",
    "instruct": "instruct instruction* instruction-following alpaca openorca orca "
    "slimorca self-instruct openhermes wizardlm",
    "function-calling": "function-calling function_calling tool-use tool-calling toolbench xlam "
    "glaive-function-calling gorilla agent agentic",
    "summarization": "summarization summarisation summarize summary summaries xsum cnn_dailymail "
    "samsum cnn-dailymail",
    "translation": "translation translate translator wmt* opus* flores",
    "classification": "classification text-classification token-classification "
    "sequence-classification classifier ner sentiment* sentiment-analysis emotion* imdb sst2 "
    "ag_news glue mnli yelp* phishing toxicity spam image-classification",
    "qa": "qa question-answering squad* triviaqa natural-questions nq rag hotpotqa boolq",
    "roleplay": "roleplay role-play rp character persona pippa",
    "writing": "story stories storytelling creative-writing creative writer writing poetry poem* "
    "rhyme* novel tinystories shakespeare",
    "medical": "medical medicine clinical pubmed* medqa medmcqa biomedical health",
    "legal": "legal law lawyer legalbench contract*",
    "finance": "finance financial fin-* fingpt banking stocks stock-market",
    "safety": "safety guard jailbreak moderation red-team* redteam*",
    "vision": "vision image-to-text ocr vqa visual captioning",
    "speech": "speech asr automatic-speech-recognition tts text-to-speech voice",
    "retrieval": "retrieval reranking reranker embedding embeddings",
    "extraction": "extraction information-extraction entity-extraction json-extraction",
}

# In running text these are too common to mean a skill; in a tag, a dataset or a name they do.
_WEAK_IN_PROSE = frozenset(
    """code python java javascript typescript rust apps agent arc character health safety guard
    logic voice thinking assistant visual glue opus instruction* embedding
    embeddings writing persona classifier""".split()
)
_LANGUAGE = re.compile(r"[a-z]{2,3}\Z")
_NOT_SKILLS = frozenset({"text-generation", "text2text-generation"})


def _patterns() -> list[tuple[str, re.Pattern[str], str]]:
    rows = []
    for skill, words in SKILLS.items():
        for word in dict.fromkeys([skill, *words.split()]):
            body = re.escape(word.rstrip("*")).replace(r"\-", "[-_ ]") + (
                r"\w*" if word.endswith("*") else ""
            )
            rows.append((skill, re.compile(rf"(?<![a-z0-9+]){body}(?![a-z0-9+])"), word))
    return rows


_PATTERNS = _patterns()


def find_skills(card: Card, names: Iterable[str] = ()) -> list[tuple[str, str, str]]:
    """Skills as (name, source, evidence), each name and source once.

    Args:
        card: the adapter's card, or its repo's.
        names: the repo's and folder's names, which often say it best.
    """
    found: dict[tuple[str, str], str] = {}

    def look(text: str, source: str, evidence: str, but: frozenset[str] = frozenset()) -> None:
        lowered = text.lower()
        for skill, pattern, word in _PATTERNS:
            if word not in but and pattern.search(lowered):
                found.setdefault((skill, source), evidence.format(word.rstrip("*")))

    for tag in (*card.tags, *card.tasks):
        if not tag.startswith(("base_model:", "license:", "arxiv:", "region:")):
            look("" if tag in _NOT_SKILLS else tag, "card", f"tag {_plain(tag)}")
    for dataset in card.datasets:
        look(dataset, "dataset", f"dataset {_plain(dataset)}")
    for name in names:
        look(name, "card", f"name {_plain(name)}")
    look(f"{card.title} . {card.description}", "card", "word {}", _WEAK_IN_PROSE)
    if ("translation", "card") in found or ("translation", "dataset") in found:
        for language in card.languages:
            if _LANGUAGE.match(language.lower()):
                found.setdefault((f"translation:{language.lower()}", "card"), "card's language")
    return [(skill, source, evidence) for (skill, source), evidence in found.items()]


def _plain(text: str) -> str:
    return text.replace("{", "(").replace("}", ")")
