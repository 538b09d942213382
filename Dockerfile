# The server, without root and without a writable root:
#   docker run --read-only --tmpfs /tmp --cap-drop=ALL -v $PWD/models:/models:ro -v calserve:/data -p 127.0.0.1:8001:8001 calserve
# For CUDA, build FROM an image with the CUDA and cuDNN libraries that onnxruntime-gpu's release asks for.

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY protos protos
COPY calibrators calibrators
COPY service service
RUN python -m venv /opt/calserve \
    && /opt/calserve/bin/pip install --no-cache-dir -c constraints.txt .

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
# Inside a container the network is the container's own; publish the ports on 127.0.0.1 as above.
ENTRYPOINT ["calserve"]
CMD ["serve", "--host", "0.0.0.0"]
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8002/health/ready', timeout=2)"]
