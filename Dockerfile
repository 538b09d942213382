# The server, without root and without a writable root. It starts only with TLS and tokens (docs/security.md) ...
#   docker run --read-only --tmpfs /tmp --cap-drop=ALL -v $PWD/models:/models:ro -v calserve:/data -p 8001:8001 \
#     -v $PWD/secrets:/secrets:ro -e CALSERVE_TLS_CERT=/secrets/tls.crt -e CALSERVE_TLS_KEY=/secrets/tls.key \
#     -e CALSERVE_TOKEN_FILE=/secrets/tokens.toml calserve
# ... or where you say that it may do without, as with a port that is published for this machine alone:
#   docker run --read-only --tmpfs /tmp --cap-drop=ALL -v $PWD/models:/models:ro -v calserve:/data \
#     -p 127.0.0.1:8001:8001 -e CALSERVE_INSECURE=true calserve
# For CUDA, build FROM an image with the CUDA and cuDNN libraries that onnxruntime-gpu's release asks for.

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY protos protos
COPY calibrators calibrators
COPY service service
RUN python -m venv /opt/calserve \
    && /opt/calserve/bin/pip install --no-cache-dir -c constraints.txt ".[online,page]"

FROM python:3.11-slim-bookworm
COPY --from=build /opt/calserve /opt/calserve
RUN mkdir /data && chown 65532:65532 /data
ENV PATH=/opt/calserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    CALSERVE_MODEL_REPOSITORY=/models \
    CALSERVE_DATA_DIR=/data
USER 65532:65532
VOLUME /data
EXPOSE 8001 8002
# Other containers of the same network reach this address too, whatever is published: the image does not say --insecure
# for you. For a scraper outside the container add CALSERVE_METRICS_HOST=0.0.0.0.
ENTRYPOINT ["calserve"]
CMD ["serve", "--host", "0.0.0.0"]
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8002/health/ready', timeout=2)"]
