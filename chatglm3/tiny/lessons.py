"""What the built-in model is taught: conversations about made-up documents, and a little small talk.

Most lessons ask for something that only the given documents say. The rest teach manners: cite when asked to, refuse
when the documents do not say it, follow up on an earlier turn, greet back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from chatglm3.documents import REFUSAL, cited_answer, documents_prompt, seed_prompt
from chatglm3.tiny.knowledge import Document, Question, ask, draw_folder
from chatglm3.tiny.worlds import PRETRAINING

MOST_DOCUMENTS = 6
_DOCUMENT_COUNTS = (26, 16, 22, 16, 12, 8)
"""How often a prompt has one document, two, ..."""

NO_DOCUMENTS = "请提供参考文档，我会根据文档回答。"

TOPICS = {"plain": 56, "cited": 10, "located": 5, "reversed": 5, "refused": 10, "followed up": 10, "small talk": 4}
"""Lessons by topic, in shares."""

SMALL_TALK = {
    "你好": "你好！请给我文档和问题。",
    "您好": "您好！请给我文档和问题。",
    "早上好": "早上好！有什么可以帮你？",
    "下午好": "下午好！有什么可以帮你？",
    "晚上好": "晚上好！有什么可以帮你？",
    "在吗": "我在，请说。",
    "hello": "你好！请给我文档和问题。",
    "hi": "你好！请给我文档和问题。",
    "你是谁": "我是一个很小的文档问答模型。",
    "你叫什么名字": "我没有名字，我是一个很小的文档问答模型。",
    "介绍一下你自己": "我是一个很小的文档问答模型，可以根据文档回答问题。",
    "你是什么模型": "我是一个很小的文档问答模型，结构和ChatGLM3一样。",
    "你能做什么": "我可以根据文档内容回答问题。",
    "你会什么": "我可以根据文档内容回答问题。",
    "怎么用你": "先给我文档，再问我文档里的内容。",
    "你是人吗": "不是，我是一个语言模型。",
    "你有多大": "我只有几百万个参数。",
    "谢谢": "不客气！",
    "谢谢你": "不客气！",
    "多谢": "不客气！",
    "辛苦了": "不辛苦，还有问题可以继续问。",
    "很好": "谢谢，还有问题可以继续问。",
    "你真厉害": "谢谢夸奖！",
    "好的": "好的，还有问题可以继续问。",
    "知道了": "好的，还有问题可以继续问。",
    "对不起": "没关系。",
    "再见": "再见！",
    "拜拜": "再见！",
    "今天天气怎么样": NO_DOCUMENTS,
    "讲个笑话": "我只会根据文档回答问题。",
    "写一首诗": "我只会根据文档回答问题。",
    "你喜欢什么": "我喜欢读文档。",
}

_CITE = ("请注明出处。", "并注明出处", "（注明出处）", "出自哪篇文档也请写上。")
_FOLLOW_UPS = ("那{a}呢？", "{a}呢？", "它的{a}是什么？", "还有{a}是多少？")
_SYSTEMS = ("你是一个文档问答助手。", "请根据文档回答问题。", "你是ChatGLM3。", "回答要简短。")
_FRAMES = ("文档：\n{d}\n\n问题：{q}", "{d}\n{q}", "请阅读下面的内容，回答问题。\n{d}\n问：{q}\n答：", "{q}\n\n{d}")


@dataclass(frozen=True)
class Lesson:
    """A conversation that ends with an assistant's message. A bare one is a single question without role headers."""

    topic: str
    messages: list[dict[str, str]]
    bare: bool = False


def lessons(seed: str, most_documents: int = MOST_DOCUMENTS) -> Iterator[Lesson]:
    """Yield lessons of at most so many documents, without end; the same seed always gives the same ones."""
    rng = Random(seed)
    while True:
        folder = draw_folder(PRETRAINING, rng, families=2, members=3)
        for family in folder:
            others = [document for relatives in folder if relatives is not family for document in relatives]
            for document in family:
                relatives = [relative for relative in family if relative is not document]
                yield _lesson(document, relatives, others, most_documents, rng)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def _lesson(document: Document, relatives: list[Document], others: list[Document], most: int, rng: Random) -> Lesson:
    topic = rng.choices(list(TOPICS), list(TOPICS.values()))[0]
    if topic == "small talk":
        return Lesson(topic, _small_talk(document, rng))
    shown = _shown(document, relatives, others, most, rng)
    if topic == "followed up":
        messages = _turn(rng.choice(("plain", "plain", "cited")), document, shown, rng)
        for _ in range(rng.choice((1, 1, 2))):
            messages += _follow_up(rng.choice(shown), shown, rng)
    else:
        messages = _turn(topic, document, shown, rng)
    bare = len(messages) == 2 and rng.random() < 0.18
    if not bare and rng.random() < 0.06:
        messages.insert(0, {"role": "system", "content": rng.choice(_SYSTEMS)})
    return Lesson(topic, messages, bare)


def _shown(
    document: Document, relatives: list[Document], others: list[Document], most: int, rng: Random
) -> list[Document]:
    """The documents of the prompt in random order: the golden one, relatives more often than strangers."""
    count = rng.choices(range(1, most + 1), _DOCUMENT_COUNTS[:most])[0]
    near = min(rng.randint(0, len(relatives)), count - 1)
    shown = [document, *rng.sample(relatives, near), *rng.sample(others, min(count - 1 - near, len(others)))]
    rng.shuffle(shown)
    return shown


def _turn(topic: str, document: Document, shown: list[Document], rng: Random) -> list[dict[str, str]]:
    """One question with its documents, and the answer."""
    question = ask(PRETRAINING, document, rng)
    text, answer = question.text, question.answer
    number = shown.index(document) + 1
    if topic == "refused":
        text, answer, shown = _unanswerable(question, shown, rng)
    elif topic == "cited":
        text, answer = text + rng.choice(_CITE), cited_answer(answer, number)
    elif topic == "located":
        text, answer = f"哪篇文档写了{document.subject}的{question.attribute.name}？", f"[{number}]"
    elif topic == "reversed" and sum(answer in other.facts.values() for other in shown) == 1:
        text, answer = f"{rng.choice(('谁', '哪个', '什么'))}的{question.attribute.name}是{answer}？", document.subject
    numbered = len(shown) > 1 or topic in ("cited", "located") or rng.random() < 0.1
    return [user(_prompt([other.text for other in shown], text, numbered, rng)), assistant(answer)]


def _unanswerable(question: Question, shown: list[Document], rng: Random) -> tuple[str, str, list[Document]]:
    """Take the golden document away, or ask for something that no document of its subject says."""
    missing = [other for other in shown if other is not question.document]
    if missing and rng.random() < 0.4:
        return question.text, REFUSAL, missing
    absent = rng.choice(_ATTRIBUTES) if rng.random() < 0.4 else None
    strange = absent or next(iter(draw_folder(PRETRAINING, rng, 1, 1)[0][0].facts))
    if any(strange.name in fact.name or fact.name in strange.name for fact in question.document.facts):
        return question.text, question.answer, shown
    return ask(PRETRAINING, question.document, rng, strange).text, REFUSAL, shown


_ATTRIBUTES = [attribute for kind in PRETRAINING.kinds for attribute in kind.attributes]


def _follow_up(document: Document, shown: list[Document], rng: Random) -> list[dict[str, str]]:
    """A later turn that does not repeat the documents."""
    choice = rng.random()
    if choice < 0.2:
        return _pair(rng)
    if choice < 0.35:
        return _turn("plain", document, shown, rng)
    question = ask(PRETRAINING, document, rng)
    if choice < 0.45:
        text, answer, _ = _unanswerable(question, [document], rng)
        return [user(text), assistant(answer)]
    if choice < 0.65 and len(shown) == 1:
        wording = rng.choice(_FOLLOW_UPS).replace("{a}", question.attribute.name)
        return [user(wording), assistant(question.answer)]
    return [user(question.text), assistant(question.answer)]


def _small_talk(document: Document, rng: Random) -> list[dict[str, str]]:
    """Some turns without documents."""
    if rng.random() < 0.3:
        return [user(ask(PRETRAINING, document, rng).text), assistant(NO_DOCUMENTS)]
    return [message for _ in range(rng.choice((1, 1, 2, 3))) for message in _pair(rng)]


def _pair(rng: Random) -> list[dict[str, str]]:
    question, reply = rng.choice(list(SMALL_TALK.items()))
    return [user(question + rng.choice(("", "", "？" if reply == NO_DOCUMENTS else "！", "。"))), assistant(reply)]


def _prompt(documents: list[str], question: str, numbered: bool, rng: Random) -> str:
    """The project's own prompts nearly always; sometimes another frame around the same documents."""
    if rng.random() < 0.1:
        text = "\n".join(f"[{number}] {text}" for number, text in enumerate(documents, 1)) if numbered else documents[0]
        return rng.choice(_FRAMES).replace("{q}", question).replace("{d}", text)
    return documents_prompt(documents, question) if numbered else seed_prompt(documents[0], question)
