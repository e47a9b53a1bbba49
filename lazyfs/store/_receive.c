/* Receives the body of an answer into given memory, without the interpreter's lock.

   OpenSSL returns one record (16 KiB at most) a call. When Python made each of these calls, a thread
   took the interpreter's lock 60,000 times for a gigabyte, in competition with all other threads. Here
   one call receives a whole block.

   The connection is one of Python's `ssl` module, which has checked the server's certificate. Its
   functions are taken from the OpenSSL that this module is linked with, and its SSL object from the
   module's own structure, which is the same in CPython 3.10 to 3.14 (`PySSLSocket` in Modules/_ssl.c).
   What can be compared is compared first; if it is something else, nothing is received here, and the
   caller uses Python's functions. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

typedef struct ssl_st SSL;

/* From openssl/ssl.h. */
#define SSL_ERROR_SSL 1
#define SSL_ERROR_WANT_READ 2
#define SSL_ERROR_WANT_WRITE 3
#define SSL_ERROR_SYSCALL 5

static struct {
    int (*read_ex)(SSL *, void *, size_t, size_t *);
    int (*get_error)(const SSL *, int);
    int (*get_fd)(const SSL *);
    void (*set_read_ahead)(SSL *, int);
    void (*clear_error)(void);
    unsigned long (*peek_error)(void);
    const char *(*reason_error_string)(unsigned long);
    int is_known;
} openssl;

static PyObject *tls_type; /* of the `_sslobj` of an ssl.SSLSocket */

/* How an object of `tls_type` begins. */
typedef struct {
    PyObject_HEAD
    PyObject *socket; /* a weak reference */
    SSL *ssl;
    PyObject *context;
} TlsObject;

/* A thread that waits is woken when this much has come, not for each segment. */
#define WAKES_AT (64 << 10)
/* The end is taken as it comes: a part of a record may be with OpenSSL, not with the kernel. */
#define LAST_BYTES (WAKES_AT + (32 << 10))

static const char CLOSED[] = "the server closed the connection";

typedef struct {
    int fd;
    SSL *ssl; /* NULL: the connection is not encrypted */
    char *into;
    size_t size;
    size_t done;
    int silence_ms;
    long long patience_ends_ms; /* 0: bytes have come since the last wait */
    int wakes_at;
    char told[120]; /* why it failed */
} Receipt;

typedef enum { FULL, SILENT, INTERRUPTED, FAILED } End;

static void wake_at(Receipt *receipt, int bytes) {
    if (receipt->wakes_at != bytes) {
        receipt->wakes_at = bytes;
        /* Without it, the thread is woken more often. */
        (void)setsockopt(receipt->fd, SOL_SOCKET, SO_RCVLOWAT, &bytes, sizeof bytes);
    }
}

static void tell(Receipt *receipt, const char *why) {
    strncpy(receipt->told, why, sizeof receipt->told - 1);
}

/* Wait for an event of poll(2). Returns as poll(2): 0 if nothing has come for too long. */
static int wait_for(Receipt *receipt, int events) {
    struct timespec clock;
    clock_gettime(CLOCK_MONOTONIC, &clock);
    long long now_ms = clock.tv_sec * 1000LL + clock.tv_nsec / 1000000;
    if (!receipt->patience_ends_ms)
        receipt->patience_ends_ms = now_ms + receipt->silence_ms;
    long long left_ms = receipt->patience_ends_ms - now_ms; /* less after a signal */
    struct pollfd wait = {.fd = receipt->fd, .events = (short)events};
    return poll(&wait, 1, left_ms > 0 ? (int)left_ms : 0);
}

/* Receive what is there. Returns 1 if something was, 0 after a failure, and otherwise the negated
   events of poll(2) to wait for. */
static int take(Receipt *receipt) {
    char *into = receipt->into + receipt->done;
    size_t left = receipt->size - receipt->done;
    if (!receipt->ssl) {
        ssize_t count = recv(receipt->fd, into, left, MSG_DONTWAIT);
        if (count > 0) {
            receipt->done += count;
            return 1;
        }
        if (count < 0 && (errno == EAGAIN || errno == EINTR))
            return -POLLIN;
        tell(receipt, count ? strerror(errno) : CLOSED);
        return 0;
    }
    size_t count = 0;
    int result = openssl.read_ex(receipt->ssl, into, left, &count);
    if (result == 1) {
        receipt->done += count;
        return 1;
    }
    int was = errno;
    unsigned long first;
    const char *reason;
    switch (openssl.get_error(receipt->ssl, result)) {
    case SSL_ERROR_WANT_READ:
        return -POLLIN;
    case SSL_ERROR_WANT_WRITE:
        return -POLLOUT;
    case SSL_ERROR_SYSCALL:
        tell(receipt, was ? strerror(was) : CLOSED);
        break;
    case SSL_ERROR_SSL:
        /* What the record layer found. OpenSSL 3.2 and newer add that the record layer failed. */
        first = openssl.peek_error();
        reason = first ? openssl.reason_error_string(first) : NULL;
        tell(receipt, reason ? reason : "an error of TLS");
        break;
    default:
        tell(receipt, CLOSED);
    }
    openssl.clear_error(); /* the errors of this thread would be taken for those of its next call */
    return 0;
}

/* Fill the memory. */
static End fill(Receipt *receipt) {
    int was_silent = 0;
    while (receipt->done < receipt->size) {
        int taken = take(receipt);
        if (taken == 0)
            return FAILED;
        if (taken > 0) {
            was_silent = 0;
            receipt->patience_ends_ms = 0;
            continue;
        }
        if (was_silent)
            return SILENT;
        wake_at(receipt, receipt->size - receipt->done > LAST_BYTES ? WAKES_AT : 1);
        int ready = wait_for(receipt, -taken);
        if (ready < 0 && errno == EINTR)
            return INTERRUPTED;
        /* Less than wakes the thread may have come. */
        was_silent = ready == 0;
    }
    return FULL;
}

/* The SSL object of a connection; NULL if it cannot be told for certain. */
static SSL *ssl_of(PyObject *object, int fd) {
    if (!openssl.is_known || (PyObject *)Py_TYPE(object) != tls_type)
        return NULL;
    TlsObject *tls = (TlsObject *)object;
    PyObject *context = PyObject_GetAttrString(object, "context");
    int is_same = context && context == tls->context;
    Py_XDECREF(context);
    if (!is_same || !tls->socket || Py_TYPE(tls->socket) != &_PyWeakref_RefType || !tls->ssl
        || openssl.get_fd(tls->ssl) != fd) {
        PyErr_Clear();
        return NULL;
    }
    return tls->ssl;
}

static PyObject *receive(PyObject *Py_UNUSED(module), PyObject *arguments) {
    Receipt receipt = {.wakes_at = 1};
    PyObject *tls;
    Py_buffer into;
    double silence_s;
    if (!PyArg_ParseTuple(arguments, "iOw*d", &receipt.fd, &tls, &into, &silence_s))
        return NULL;
    receipt.into = into.buf;
    receipt.size = into.len;
    receipt.silence_ms = silence_s < 2e6 ? (int)(silence_s * 1000) : 2000000000;
    if (tls != Py_None) {
        receipt.ssl = ssl_of(tls, receipt.fd);
        if (!receipt.ssl) {
            PyBuffer_Release(&into);
            return Py_BuildValue("ns", (Py_ssize_t)0, NULL);
        }
        openssl.clear_error(); /* so that the first one is of this call */
        openssl.set_read_ahead(receipt.ssl, 1); /* one system call for each record, not two */
    }
    End end;
    do {
        Py_BEGIN_ALLOW_THREADS
        end = fill(&receipt);
        Py_END_ALLOW_THREADS
    } while (end == INTERRUPTED && PyErr_CheckSignals() == 0);
    wake_at(&receipt, 1);
    PyBuffer_Release(&into);
    if (end == INTERRUPTED)
        return NULL; /* the exception is that of a signal handler */
    if (end == SILENT) {
        PyErr_SetString(PyExc_TimeoutError, "the read operation timed out");
        return NULL;
    }
    return Py_BuildValue("ns", (Py_ssize_t)receipt.done, end == FAILED ? receipt.told : NULL);
}

static PyObject *knows_tls(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none)) {
    return PyBool_FromLong(openssl.is_known);
}

/* Find the functions of the OpenSSL that the module `_ssl` is linked with. */
static void find_openssl(void) {
    PyObject *module = PyImport_ImportModule("_ssl");
    PyObject *file = module ? PyObject_GetAttrString(module, "__file__") : NULL;
    PyObject *path = file ? PyUnicode_EncodeFSDefault(file) : NULL;
    tls_type = module ? PyObject_GetAttrString(module, "_SSLSocket") : NULL;
    /* It is loaded already. The handle is kept, as its functions are used from now on. */
    void *library = path ? dlopen(PyBytes_AsString(path), RTLD_LAZY | RTLD_NOLOAD) : NULL;
    PyObject *size = tls_type ? PyObject_GetAttrString(tls_type, "__basicsize__") : NULL;
    int is_long_enough = size && PyLong_AsSsize_t(size) >= (Py_ssize_t)sizeof(TlsObject);
    if (library && is_long_enough) {
        struct {
            const char *name;
            void *place;
        } wanted[] = {
            {"SSL_read_ex", &openssl.read_ex},
            {"SSL_get_error", &openssl.get_error},
            {"SSL_get_fd", &openssl.get_fd},
            {"SSL_set_read_ahead", &openssl.set_read_ahead},
            {"ERR_clear_error", &openssl.clear_error},
            {"ERR_peek_error", &openssl.peek_error},
            {"ERR_reason_error_string", &openssl.reason_error_string},
        };
        openssl.is_known = 1;
        for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
            void *found = dlsym(library, wanted[i].name);
            memcpy(wanted[i].place, &found, sizeof found);
            openssl.is_known &= found != NULL;
        }
    }
    Py_XDECREF(size);
    Py_XDECREF(path);
    Py_XDECREF(file);
    Py_XDECREF(module);
    PyErr_Clear(); /* a Python without ssl, or with one that is a part of the program */
}

static PyMethodDef methods[] = {
    {"receive", receive, METH_VARARGS, "See _receive.pyi."},
    {"knows_tls", knows_tls, METH_NOARGS, "See _receive.pyi."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "lazyfs.store._receive",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__receive(void) {
    PyObject *module = PyModule_Create(&definition);
    if (module)
        find_openssl();
    return module;
}
