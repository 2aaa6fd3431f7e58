"""One suite for the operators in every language: what they share is stated and tested once here."""
