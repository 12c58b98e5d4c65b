"""What a model reveals about the records it was trained on, measured: attacks, extraction, exposure.

A measurement says what these attacks found on these records. A low number is no proof that another attack
finds nothing, and no number here is a privacy guarantee.
"""
