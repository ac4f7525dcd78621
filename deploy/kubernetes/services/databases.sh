#!/bin/bash
# Run once by the postgres image, on an empty data folder: a database and an owner for each service.
# psql quotes the passwords itself; they are in no argument and no log.
set -euo pipefail
for name in dagster mlflow; do
    variable="${name^^}_POSTGRES_PASSWORD"
    : "${!variable:?is not set}"
    psql -v ON_ERROR_STOP=1 --username postgres <<SQL
\getenv password $variable
CREATE ROLE $name LOGIN PASSWORD :'password';
CREATE DATABASE $name OWNER $name;
REVOKE ALL ON DATABASE $name FROM PUBLIC;
SQL
done
