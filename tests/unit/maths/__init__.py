"""The maths, against enumeration, finite differences and slow plain references."""
