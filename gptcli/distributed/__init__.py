"""Many processes as one: who they are, what they tell each other, and what if one falls silent."""
