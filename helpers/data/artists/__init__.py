"""Pictures in the styles of artists who gave them away: a parquet file each, its licence, and how it was made."""
