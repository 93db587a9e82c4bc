"""A certificate for one run: it lets in the run's own processes and nobody else."""

from __future__ import annotations

import datetime

from distributed.security import Security


def make_security() -> Security:
    """TLS between processes of one run, by a key that is made for it, lies in memory and is given to them alone.

    As Dask's `Security.temporary()`, but an elliptic curve's: its key is made in 1 ms rather than 30 to 300.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "outsize")])
    now = datetime.datetime.now(tz=datetime.UTC).replace(tzinfo=None)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # The machine's clock may be set while it runs.
        .not_valid_before(now - datetime.timedelta(days=365))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    shown = certificate.public_bytes(serialization.Encoding.PEM).decode()
    return Security(
        require_encryption=True,
        tls_ca_file=shown,
        tls_client_cert=shown,
        tls_client_key=secret,
        tls_scheduler_cert=shown,
        tls_scheduler_key=secret,
        tls_worker_cert=shown,
        tls_worker_key=secret,
    )
