ARG PYTHON_IMAGE=python:3.11-slim

# --- runtime: aiohttp and the modules ---
FROM ${PYTHON_IMAGE} AS runtime
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /app
# The packages first: this layer is made anew only when they change. The first line of
# requirements.txt is all that the service needs; the others are for the tests.
COPY requirements.txt .
# For events in PostgreSQL: docker build --build-arg STORE_DRIVER='psycopg[binary]' .
ARG STORE_DRIVER=""
RUN grep '^aiohttp==' requirements.txt > /tmp/runtime.txt \
    && pip install --no-cache-dir --disable-pip-version-check -r /tmp/runtime.txt $STORE_DRIVER \
    && rm /tmp/runtime.txt
# A new volume takes over the owner of the folder that it covers, so that is made here.
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin appuser \
    && install -d -o appuser -g appuser data
COPY aggregator.py postgres.py publisher.py dashboard.html ./

# --- test: docker build --target test . ---
FROM runtime AS test
RUN pip install --no-cache-dir --disable-pip-version-check -r requirements.txt
COPY test_aggregator.py README.md ./
RUN chown appuser . && su -s /bin/sh appuser -c "python -m pytest -q -p no:cacheprovider"

# --- the image that is built by default ---
FROM runtime
USER appuser
ENV HOST=0.0.0.0 DB_PATH=/app/data/dedup.db
VOLUME /app/data
EXPOSE 8080
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ.get('PORT', '8080') + '/', timeout=2)"]
CMD ["python", "aggregator.py"]
