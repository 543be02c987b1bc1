"""Published claims as experiments with a verdict: PASS, FAIL, REPORTED or NOT RUN."""
