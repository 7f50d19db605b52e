"""What happens after a numerical fault: replay, verdict, evidence."""
