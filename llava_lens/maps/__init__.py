"""Maps: how much each patch of a picture matters for an answer, by every known method, and how good those maps are."""
