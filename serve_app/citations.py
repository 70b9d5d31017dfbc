"""Where an answer's quotes stand in the caller's documents, and what of these the model did not see."""

from collections.abc import Sequence

from chatglm3.documents import DocumentAnswer
from chatglm3.fitting import Part
from chatglm3.quotations import find_answer, find_quotation
from chatglm3.windows import Span
from serve_app.answer_schema import AnswerRequest, Citation, Cut, Document, Fit, Match


def fit_report(documents: Sequence[Document], parts: Sequence[Part]) -> Fit:
    """What of the documents a prompt of these parts does not show, in characters of their texts."""
    shown = {part.index for part in parts}
    cut = []
    for part in parts:
        document = documents[part.index]
        if part.end - part.start < len(document.shown):
            start, end = (max(0, place - document.text_start) for place in (part.start, part.end))
            cut.append(Cut(document=part.index, start=start, end=end))
    return Fit(omitted=[index for index in range(len(documents)) if index not in shown], cut=cut)


def cite(answer: DocumentAnswer, body: AnswerRequest, parts: Sequence[Part]) -> list[Citation]:
    """The answer's citations of prompt documents as citations of the caller's; numbers of no document are dropped."""
    citations = []
    for number in answer.citations:
        if not 1 <= number <= len(parts):
            continue
        part = parts[number - 1]
        document = body.documents[part.index]
        # Looked for in what the model saw, lest an equal passage elsewhere in the document be taken for it.
        begin = max(part.start, document.text_start)
        span, match = _place(answer, body.question, document.shown[begin : part.end])
        start, end = (place + begin - document.text_start for place in span) if span else (None, None)
        citations.append(
            Citation(
                document=part.index,
                id=document.id,
                title=document.title,
                quote=document.text[start:end] if span else answer.quote or None,
                start=start,
                end=end,
                match=match,
            )
        )
    return citations


def _place(answer: DocumentAnswer, question: str, text: str) -> tuple[Span | None, Match]:
    """Where in `text` the answer's quote stands, or the answer itself, if it has none; and how that was found."""
    if not answer.quote:
        span = find_answer(question, answer.text, text)
        return span, "answer" if span else None
    if found := find_quotation(answer.quote, text):
        return (found.start, found.end), "exact" if found.exact else "near"
    return None, None
