# syntax=docker/dockerfile:1
# MinIO from its source: since October 2025 the project publishes no images, and this release, which closes CVE-2025-62506,
# never had one.

FROM golang:1.25.3-alpine3.22 AS build
ARG RELEASE=RELEASE.2025-10-15T17-29-55Z
# Go checks the module and all that it needs against its checksum database.
RUN CGO_ENABLED=0 GOFLAGS=-trimpath go install -ldflags "-s -w" "github.com/minio/minio@${RELEASE}"

FROM alpine:3.22.2
RUN apk add --no-cache ca-certificates && adduser -S -D -H -u 10002 minio && install -d -o 10002 /data /queue
COPY --from=build /go/bin/minio /usr/local/bin/minio
# It makes a folder for certificates under HOME even where there are none.
ENV HOME=/tmp
USER 10002
VOLUME ["/data", "/queue"]
ENTRYPOINT ["minio"]
