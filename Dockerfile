ARG PYTHON_IMAGE=python:3.11-slim

# --- runtime: aiohttp, the service and the publisher ---
FROM ${PYTHON_IMAGE} AS runtime
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /app
# The packages come first, so this layer is made again only when they change. The service needs
# only the first line of requirements.txt. The other lines are for the tests.
COPY requirements.txt .
# For events in PostgreSQL: docker build --build-arg STORE_DRIVER='psycopg[binary]' .
ARG STORE_DRIVER=""
RUN grep '^aiohttp==' requirements.txt > /tmp/runtime.txt \
    && pip install --no-cache-dir --disable-pip-version-check -r /tmp/runtime.txt $STORE_DRIVER \
    && rm /tmp/runtime.txt
# A new volume gets the owner of the folder on which it is mounted. So the folder is made here.
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin appuser \
    && install -d -o appuser -g appuser data
COPY aggregator.py postgres.py publisher.py dashboard.html openapi.json ./

# --- test: docker build --target test . ---
FROM runtime AS test
RUN pip install --no-cache-dir --disable-pip-version-check -r requirements.txt
COPY test_aggregator.py README.md ./
COPY docs docs
RUN chown appuser . && su -s /bin/sh appuser -c "python -m pytest -q -p no:cacheprovider"

# --- the image that is built by default ---
FROM runtime
USER appuser
ENV HOST=0.0.0.0 DB_PATH=/app/data/dedup.db
VOLUME /app/data
EXPOSE 8080
# http.client asks no proxy, also where HTTP_PROXY is set. "localhost" is tried over IPv6 and IPv4.
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=3 CMD ["python", "-c", \
    "import http.client, os, sys; \
    service = http.client.HTTPConnection('localhost', int(os.environ.get('PORT') or 8080), timeout=2); \
    service.request('GET', '/health'); \
    sys.exit(service.getresponse().status != 200)"]
CMD ["python", "aggregator.py"]
