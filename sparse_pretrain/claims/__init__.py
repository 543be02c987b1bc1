"""Published claims as experiments with a verdict: PASS, FAIL or NOT RUN."""
