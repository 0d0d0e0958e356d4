// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
)

// The control plane is alone in its namespace, so its addresses are the same in every lab.
const (
	controlEtcd      = "127.0.0.1:2379"
	controlEtcdPeer  = "127.0.0.1:2380"
	controlAPIServer = "127.0.0.1:6443"
	controlUser      = "plimsoll"

	// StoragePrefix begins every key of the API server in etcd.
	StoragePrefix = "/registry"

	// controlReadyLimit is how long a busy host may take to answer; a quiet one takes two seconds.
	controlReadyLimit = 2 * time.Minute
)

// A ControlPlane is an etcd in memory and a kube-apiserver, in a network namespace that has only its loopback link. Everyone
// with the token may do everything. Controllers and a scheduler there are none.
type ControlPlane struct {
	ns    *clusters.NetNS
	group *host.Cgroup
	owned *host.Run // the run that was made for it alone; nil in a lab

	certificate []byte // PEM, the API server's own and its only issuer
	token       string

	failed context.Context // done when etcd or kube-apiserver has ended
	fail   context.CancelCauseFunc
}

// ControlPlaneOptions say where a control plane without nodes stands.
type ControlPlaneOptions struct {
	// Name is the run's name: the state file, the cgroup and the folder in memory carry it.
	Name string
	// Dir is a folder for the logs, etcd.log and kube-apiserver.log.
	Dir string
	// Bin is the folder with etcd and kube-apiserver.
	Bin string
}

// StartControlPlane starts a control plane without a lab around it, for what needs an API server and no nodes, and returns
// when it is ready. Close it.
func StartControlPlane(ctx context.Context, o ControlPlaneOptions) (*ControlPlane, error) {
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	r, err := host.New(o.Name, dir)
	if err != nil {
		return nil, err
	}
	c, err := startControlPlane(ctx, r, o.Bin)
	if err != nil {
		return nil, errors.Join(err, r.Close(context.WithoutCancel(ctx)))
	}
	c.owned = r
	return c, nil
}

// startControlPlane starts etcd and kube-apiserver from the folder bin and returns when the API server is ready. Their logs
// go to the run's folder, their data and keys to memory.
func startControlPlane(ctx context.Context, r *host.Run, bin string) (_ *ControlPlane, err error) {
	for _, program := range []string{"etcd", "kube-apiserver"} {
		if _, err := os.Stat(filepath.Join(bin, program)); err != nil {
			return nil, fmt.Errorf("%s is not built (make build does it): %w", program, err)
		}
	}
	c := &ControlPlane{token: rand.Text()}
	c.failed, c.fail = context.WithCancelCause(context.Background())
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close(context.WithoutCancel(ctx)))
		}
	}()
	memory, err := r.Memory("control")
	if err != nil {
		return nil, err
	}
	if err := c.writeKeys(memory); err != nil {
		return nil, err
	}
	if c.ns, err = clusters.NewNetNS(); err != nil {
		return nil, err
	}
	if c.group, err = r.Cgroup.Child("control"); err != nil {
		return nil, err
	}

	// A child that ends early ends the wait, with its log.
	ready, cancel := context.WithTimeout(ctx, controlReadyLimit)
	defer cancel()
	ready, end := context.WithCancelCause(ready)
	defer end(nil)
	defer context.AfterFunc(c.failed, func() { end(context.Cause(c.failed)) })()

	if err := c.start(r, "etcd", etcdArgs(bin, memory)); err != nil {
		return nil, err
	}
	// Subtle: an API server that finds no etcd backs off for a second; waiting for etcd is quicker.
	err = host.Poll(ready, "etcd to listen", func() (bool, error) {
		conn, err := c.ns.DialContext(ready, "tcp", controlEtcd)
		if err != nil {
			return false, err
		}
		return true, conn.Close()
	})
	if err != nil {
		return nil, err
	}
	if err := c.start(r, "kube-apiserver", apiServerArgs(bin, memory)); err != nil {
		return nil, err
	}
	client, err := kubernetes.NewForConfig(c.RESTConfig())
	if err != nil {
		return nil, err
	}
	err = host.Poll(ready, "kube-apiserver to be ready", func() (bool, error) {
		if _, err := client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ready); err != nil {
			return false, err
		}
		// Subtle: its own Service comes a little later, and last of it the slice; they must not come while something is measured.
		_, err := client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault).Get(ready, "kubernetes", metav1.GetOptions{})
		return err == nil, err
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// start runs one of the two programs and fails the control plane when it ends.
func (c *ControlPlane) start(r *host.Run, name string, argv []string) error {
	p, err := r.Start(host.Command{
		Name: name, Argv: argv, NetNS: c.ns, Cgroup: c.group, Log: filepath.Join(r.Dir, name+".log"),
		// Nothing else is in it: a proxy for HTTP would come between the two. Collecting garbage half as often takes a tenth
		// off the time to write a fleet, for a fifth more memory.
		Env: []string{"GOGC=200"},
	})
	if err != nil {
		return err
	}
	go func() {
		<-p.Done()
		c.fail(p.Err())
	}()
	return nil
}

// etcdArgs: the data lives in memory and is worth nothing after the run, so nothing waits for a disk; the quota holds
// 50,000 Services many times over, with the history between two compactions.
func etcdArgs(bin, memory string) []string {
	return []string{
		filepath.Join(bin, "etcd"),
		"--data-dir=" + filepath.Join(memory, "etcd"),
		"--unsafe-no-fsync",
		"--listen-client-urls=http://" + controlEtcd,
		"--advertise-client-urls=http://" + controlEtcd,
		"--listen-peer-urls=http://" + controlEtcdPeer,
		"--quota-backend-bytes=8589934592",
		// The log holds what is not committed yet, so commits may be rare.
		"--backend-batch-interval=1s",
		"--backend-batch-limit=50000",
		"--log-level=warn",
		"--log-format=console",
	}
}

// apiServerArgs: defaults where the Services under test could see a difference, and as quiet as it can be otherwise.
func apiServerArgs(bin, memory string) []string {
	return []string{
		filepath.Join(bin, "kube-apiserver"),
		"--etcd-servers=http://" + controlEtcd,
		"--etcd-prefix=" + StoragePrefix,
		"--bind-address=127.0.0.1",
		"--secure-port=6443",
		// Must not be a loopback address: it becomes the endpoint of the Service default/kubernetes.
		"--advertise-address=" + ipv4.node.String(),
		"--service-cluster-ip-range=" + strings.Join(each(func(f family) string { return f.services.String() }), ","),
		"--authorization-mode=AlwaysAllow",
		"--anonymous-auth=false",
		"--token-auth-file=" + filepath.Join(memory, "tokens.csv"),
		"--cert-dir=" + memory,
		"--tls-cert-file=" + filepath.Join(memory, "tls.crt"),
		"--tls-private-key-file=" + filepath.Join(memory, "tls.key"),
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + filepath.Join(memory, "tls.crt"),
		"--service-account-signing-key-file=" + filepath.Join(memory, "tls.key"),
		// Service accounts are made by a controller that is not here.
		"--disable-admission-plugins=ServiceAccount",
		"--enable-priority-and-fairness=false",
		"--etcd-count-metric-poll-period=0",
		"--etcd-db-metric-poll-interval=0",
		"--profiling=false",
	}
}

// writeKeys makes the token file and a key with a certificate of its own for the API server, which also signs with it.
func (c *ControlPlane) writeKeys(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make the API server's key: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "plimsoll lab"},
		// An hour's grace for a clock that is set back meanwhile.
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().AddDate(1, 0, 0),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return fmt.Errorf("make the API server's certificate: %w", err)
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode the API server's key: %w", err)
	}
	c.certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate})
	for name, content := range map[string][]byte{
		"tls.crt":    c.certificate,
		"tls.key":    pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: private}),
		"tokens.csv": []byte(c.token + "," + controlUser + "," + controlUser + ",system:masters\n"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// DialContext opens a connection to the API server from inside its namespace.
func (c *ControlPlane) DialContext(ctx context.Context) (net.Conn, error) {
	return c.ns.DialContext(ctx, "tcp", controlAPIServer)
}

// Forward carries the connections that l accepts to the API server, whose namespace has no link, until l is closed.
func (c *ControlPlane) Forward(l net.Listener) {
	for {
		near, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer near.Close()
			far, err := c.DialContext(context.Background())
			if err != nil {
				// The client sees a closed connection and tries again, as with any API server that is away.
				return
			}
			defer far.Close()
			go func() {
				io.Copy(far, near)
				far.Close()
			}()
			io.Copy(near, far)
		}()
	}
}

// RESTConfig reaches the API server from this process as an administrator, in protobuf and without a limit of rate.
func (c *ControlPlane) RESTConfig() *rest.Config {
	return &rest.Config{
		Host:            "https://" + controlAPIServer,
		BearerToken:     c.token,
		TLSClientConfig: rest.TLSClientConfig{CAData: c.certificate},
		ContentConfig: rest.ContentConfig{
			ContentType:        runtime.ContentTypeProtobuf,
			AcceptContentTypes: runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON,
		},
		QPS:       -1,
		UserAgent: controlUser,
		Dial:      func(ctx context.Context, _, _ string) (net.Conn, error) { return c.DialContext(ctx) },
	}
}

// Etcd reaches the API server's storage; its keys begin with StoragePrefix. Close the client.
func (c *ControlPlane) Etcd() (*clientv3.Client, error) {
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{"http://" + controlEtcd},
		// Its errors are returned; it need not print them as well.
		Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return c.ns.DialContext(ctx, "tcp", controlEtcd)
		})},
	})
	if err != nil {
		return nil, fmt.Errorf("etcd client: %w", err)
	}
	return client, nil
}

// Kubeconfig writes a file for programs that reach the API server at a port of 127.0.0.1, which the certificate is for. Only its owner may
// read it.
func (c *ControlPlane) Kubeconfig(path, address string) error {
	config := clientcmdapi.NewConfig()
	config.Clusters["lab"] = &clientcmdapi.Cluster{Server: "https://" + address, CertificateAuthorityData: c.certificate}
	config.AuthInfos[controlUser] = &clientcmdapi.AuthInfo{Token: c.token}
	config.Contexts["lab"] = &clientcmdapi.Context{Cluster: "lab", AuthInfo: controlUser}
	config.CurrentContext = "lab"
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// Done is closed when etcd or kube-apiserver has ended; Err then says which and quotes the end of its log.
func (c *ControlPlane) Done() <-chan struct{} { return c.failed.Done() }

// Err is nil as long as both run.
func (c *ControlPlane) Err() error { return context.Cause(c.failed) }

// errClosed is what Err says after Close.
var errClosed = errors.New("the control plane is closed")

// Close kills both programs, which have nothing to save, and lets go of their namespace.
func (c *ControlPlane) Close(ctx context.Context) error {
	c.fail(errClosed)
	var errs []error
	if c.group != nil {
		errs = append(errs, c.group.Remove(ctx))
	}
	if c.ns != nil {
		errs = append(errs, c.ns.Close())
	}
	if c.owned != nil {
		errs = append(errs, c.owned.Close(ctx))
	}
	return errors.Join(errs...)
}
