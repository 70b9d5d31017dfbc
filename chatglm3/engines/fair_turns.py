"""Whose waiting request is next: clients take turns by tokens, however many requests each of them has sent.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): a client's requests stand one behind the other, each as
long as its tokens, and the one that begins first is next. A client that comes anew begins where the queue is now, so
that it waits for nobody's backlog and is owed nothing for the time that it was away.
"""


class FairTurns:
    """Gives out turns. The lowest turn is next; among equals, whoever came first."""

    def __init__(self) -> None:
        self._now = 0
        self._ends: dict[str, int] = {}
        """Of each client's last request, if it lies ahead."""

    def take(self, client: str, tokens: int) -> int:
        """The turn of a new request that reads and may write so many tokens."""
        turn = max(self._now, self._ends.get(client, 0))
        self._ends[client] = turn + tokens
        return turn

    def give_back(self, client: str, tokens: int) -> None:
        """A request of the client's has ended, and so many of its tokens were neither read nor written."""
        if client in self._ends:
            self._ends[client] -= tokens

    def begin(self, turn: int) -> None:
        """A request has left the queue."""
        if turn > self._now:
            self._now = turn
            self._ends = {client: end for client, end in self._ends.items() if end > turn}
