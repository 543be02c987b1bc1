"""Many runs: tables, differences, sweeps and what to conclude from them."""
