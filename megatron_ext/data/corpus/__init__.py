"""The real bilingual corpus: fetched from registry packages, never committed."""
