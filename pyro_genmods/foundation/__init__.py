"""The cellar: torch only, no distribution, no mechanism. Everything two rooms share lives here."""
