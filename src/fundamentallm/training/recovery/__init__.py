"""After a number went wrong: replay, verdict, evidence, interventions."""
