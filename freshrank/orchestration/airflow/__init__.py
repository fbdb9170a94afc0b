"""The Airflow operator, its trigger and the local Airflow."""
