"""The scheduler's side: how many blocks a request holds, and what goes on from what."""
