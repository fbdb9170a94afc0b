"""What a web server imports to ask for a ranking.

No polars, torch or pandas, and what costs time is imported when it is first needed: gRPC with the first client, pyarrow
with the first id that is text.
"""

from freshrank.serving.client.client import Answer, AsyncClient, Client
from freshrank.serving.client.ids import UNKNOWN_ID, Codes, Id, unknown_id

__all__ = ["UNKNOWN_ID", "Answer", "AsyncClient", "Client", "Codes", "Id", "unknown_id"]
