//! The request plane through real sockets: HTTP on one side, QUIC to a head that answers by script
//! on the other.

mod api_http {
    mod adapters;
    mod answers;
    mod client;
    mod failures;
    mod head;
    mod keys;
    mod recovery;
    mod refusals;
    mod setup;
    mod tls;
    mod traces;
}
