// SPDX-License-Identifier: Apache-2.0

package kind

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/kind/pkg/apis/config/v1alpha4"
	kindcluster "sigs.k8s.io/kind/pkg/cluster"
	"sigs.k8s.io/kind/pkg/cluster/nodes"
	"sigs.k8s.io/kind/pkg/exec"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
)

// cluster is one kind cluster: with one site, or with all that have no proxy.
type cluster struct {
	world *world
	name  string
	// last is true for the one that takes along what all clusters share.
	last    bool
	control *node
	sites   []*site
	others  []*node // workers without a site
	rest    *rest.Config
	client  kubernetes.Interface
	// kubernetes is the version that the API server says.
	kubernetes string
	etcd       *clientv3.Client

	failed context.Context // done when the control plane's node has ended
	fail   context.CancelCauseFunc
}

var _ clusters.Cluster = (*cluster)(nil)

// node is one container with a node in it.
type node struct {
	name string
	// pid is the container's first process, by which its namespaces are entered.
	pid    int
	ns     *clusters.NetNS
	cgroup *host.Cgroup
	kind   nodes.Node
}

// create makes a cluster with a worker for each site and returns once proxies are healthy, or have failed and their site's Err says
// why, and pods run. The cluster is returned with an error too: Close removes what there is.
func (w *world) create(ctx context.Context, name string, specs []clusters.ProxySpec) (*cluster, error) {
	c := &cluster{world: w, name: name}
	c.failed, c.fail = context.WithCancelCause(context.Background())
	dir := filepath.Join(w.plan.Dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return c, err
	}
	if err := w.run.Record(host.Containers{Clusters: []string{c.name}}); err != nil {
		return c, err
	}
	for _, spec := range specs {
		c.sites = append(c.sites, &site{cluster: c, spec: spec, dir: filepath.Join(w.plan.Dir, spec.Name)})
	}
	config, err := w.config(name, specs)
	if err != nil {
		return c, err
	}
	w.report("creating cluster " + c.name)
	kubeconfig := filepath.Join(dir, "kubeconfig")
	if err := c.createNodes(ctx, config, kubeconfig); err != nil {
		return c, err
	}
	if err := c.enter(ctx); err != nil {
		return c, err
	}
	if err := c.connect(ctx, kubeconfig); err != nil {
		return c, err
	}
	for _, n := range c.nodes() {
		if err := loadArchive(n.kind, w.archive); err != nil {
			return c, fmt.Errorf("load the image of the pods into %s: %w", n.name, err)
		}
	}
	for _, s := range c.sites {
		if err := s.populate(ctx); err != nil {
			return c, fmt.Errorf("%s: %w", s.spec.Name, err)
		}
	}
	if !w.plan.Static {
		return c, nil
	}
	// A kubelet that stood still, because other clusters were made or visited, has heard nothing of the container runtime for half a
	// minute. It reports that its node is not ready; the node's pods are not ready then, and Services lose them, and if it is frozen
	// again before it has reported better, the pods are evicted after five minutes.
	return c, c.freezeParts(ctx, true, kubeletPart)
}

// createNodes has kind create the cluster. kind knows no contexts: when ctx ends its containers are taken from under it.
func (c *cluster) createNodes(ctx context.Context, config *v1alpha4.Cluster, kubeconfig string) error {
	done := make(chan error, 1)
	go func() {
		done <- c.world.kind.Create(c.name,
			kindcluster.CreateWithV1Alpha4Config(config), kindcluster.CreateWithNodeImage(c.world.image),
			kindcluster.CreateWithKubeconfigPath(kubeconfig), kindcluster.CreateWithRetain(true),
			kindcluster.CreateWithDisplayUsage(false), kindcluster.CreateWithDisplaySalutation(false))
	}()
	select {
	case err := <-done:
		return explain(err)
	case <-ctx.Done():
	}
	for {
		deleteCluster(c.world.kind, c.name)
		select {
		case <-done:
			return context.Cause(ctx)
		case <-time.After(time.Second):
		}
	}
}

// explain adds the end of what a command of kind's said, and says what to do where the engine does not start a node.
func explain(err error) error {
	failed := exec.RunErrorForError(err)
	if failed == nil {
		return err
	}
	said := lastLine(failed.Output)
	if len(failed.Command) > 1 && failed.Command[1] == "run" {
		// The command's line has some thirty words, and nobody would run it by hand.
		return fmt.Errorf("the engine does not start a node, which is a privileged container: run the engine as root with all of root's rights, or take --provider lab (%s: %s)", failed.Command[0], said)
	}
	return fmt.Errorf("%w: %s", err, said)
}

// enter finds the processes of the nodes and takes hold of their namespaces and cgroups.
func (c *cluster) enter(ctx context.Context) error {
	list, err := c.world.kind.ListNodes(c.name)
	if err != nil {
		return err
	}
	for _, k := range list {
		n, err := c.world.enterNode(ctx, k)
		if err != nil {
			return fmt.Errorf("node %s: %w", k, err)
		}
		if n.name == c.controlName() {
			c.control = n
			continue
		}
		alone := true
		for i, s := range c.sites {
			if n.name == c.workerName(i) {
				s.node, alone = n, false
			}
		}
		if alone {
			c.others = append(c.others, n)
		}
	}
	if workers := c.world.workers(len(c.sites)); c.control == nil || len(c.nodes()) != workers+1 {
		return fmt.Errorf("kind made other nodes than a control plane and %d workers: %v", workers, list)
	}
	go c.watch()
	return nil
}

// controlName is kind's name for the control plane's node, workerName for its workers'.
func (c *cluster) controlName() string { return c.name + "-control-plane" }

func (c *cluster) workerName(i int) string {
	if i == 0 {
		return c.name + "-worker"
	}
	return fmt.Sprintf("%s-worker%d", c.name, i+1)
}

// watch ends when the control plane's node does.
func (c *cluster) watch() {
	fd, err := unix.PidfdOpen(c.control.pid, 0)
	if err == nil {
		defer unix.Close(fd)
		_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		for errors.Is(err, unix.EINTR) {
			_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		}
	}
	c.fail(fmt.Errorf("node %s has ended", c.control.name))
}

// enterNode takes hold of a node.
func (w *world) enterNode(ctx context.Context, k nodes.Node) (*node, error) {
	out, err := w.engine.Command(ctx, "inspect", "--format", "{{.State.Pid}}", k.String()).Output()
	if err != nil {
		return nil, fmt.Errorf("ask the engine for its process: %w", err)
	}
	n := &node{name: k.String(), kind: k}
	if n.pid, err = strconv.Atoi(strings.TrimSpace(string(out))); err != nil || n.pid == 0 {
		return nil, fmt.Errorf("the engine knows no process of it: %q", out)
	}
	if n.ns, err = clusters.NetNSOf(n.pid); err != nil {
		return nil, err
	}
	n.cgroup, err = nodeCgroup(n.pid)
	return n, err
}

// connect reaches the API server and its storage from inside the control plane's node, where they stand on every engine.
func (c *cluster) connect(ctx context.Context, kubeconfig string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	if err := c.writeControlKubeconfig(kubeconfig); err != nil {
		return err
	}
	config.Host = c.controlURL("6443")
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	config.QPS, config.UserAgent = -1, "plimsoll"
	config.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		return c.control.ns.DialContext(ctx, network, address)
	}
	c.rest = config
	if c.client, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	version, err := c.client.Discovery().ServerVersion()
	if err != nil {
		return fmt.Errorf("ask the API server for its version: %w", err)
	}
	c.kubernetes = version.GitVersion
	pki := "/etc/kubernetes/pki/"
	files := map[string][]byte{}
	for _, name := range []string{"apiserver-etcd-client.crt", "apiserver-etcd-client.key", "etcd/ca.crt"} {
		if files[name], err = exec.Output(c.control.kind.CommandContext(ctx, "cat", pki+name)); err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
	}
	pair, err := tls.X509KeyPair(files["apiserver-etcd-client.crt"], files["apiserver-etcd-client.key"])
	if err != nil {
		return fmt.Errorf("etcd's client certificate: %w", err)
	}
	issuers := x509.NewCertPool()
	issuers.AppendCertsFromPEM(files["etcd/ca.crt"])
	c.etcd, err = clientv3.New(clientv3.Config{
		Endpoints: []string{c.controlURL("2379")},
		TLS:       &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: issuers},
		Logger:    zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return c.control.ns.DialContext(ctx, "tcp", net.JoinHostPort(c.world.loopback(), "2379"))
		})},
	})
	return err
}

// controlURL is where the control plane listens on a port, to who is on its node.
func (c *cluster) controlURL(port string) string {
	return "https://" + net.JoinHostPort(c.world.loopback(), port)
}

func (c *cluster) Sites() []clusters.Site {
	all := make([]clusters.Site, len(c.sites))
	for i, s := range c.sites {
		all[i] = s
	}
	return all
}

func (c *cluster) RESTConfig() *rest.Config  { return rest.CopyConfig(c.rest) }
func (c *cluster) Etcd() *clientv3.Client    { return c.etcd }
func (c *cluster) ServiceCIDR() netip.Prefix { return c.world.families()[0].services }
func (c *cluster) Failed() <-chan struct{}   { return c.failed.Done() }
func (c *cluster) Err() error                { return context.Cause(c.failed) }

func (c *cluster) Versions() map[string]string {
	return map[string]string{"kubernetes": "Kubernetes " + c.kubernetes, "node image": c.world.image, "engine": c.world.engine.Kind}
}

// bpfMount is the unit by which a node's systemd mounts a bpffs, each time that the node starts.
//
// Note: not at /sys/fs/bpf, where hosts have theirs. systemd keeps that to itself, and mounts it in no container.
const bpfMount = `[Unit]
Before=kubelet.service
[Mount]
What=bpf
Where=/run/bpf
Type=bpf
Options=mode=700
[Install]
WantedBy=multi-user.target
`

// mountBPF gives each node a bpffs, where an agent's maps and programs stay while it restarts.
func (c *cluster) mountBPF(ctx context.Context) error {
	for _, n := range c.nodes() {
		command := n.kind.CommandContext(ctx, "sh", "-c", "cat >/etc/systemd/system/run-bpf.mount && systemctl --quiet enable --now run-bpf.mount")
		if err := command.SetStdin(strings.NewReader(bpfMount)).Run(); err != nil {
			return fmt.Errorf("mount a bpffs in %s: %w", n.name, explain(err))
		}
	}
	return nil
}

// Pause stops the control plane's node where it stands.
func (c *cluster) Pause(ctx context.Context, paused bool) error {
	return c.control.cgroup.Freeze(ctx, paused)
}

// freeze stops or resumes all of the cluster's nodes, with everything on them.
func (c *cluster) freeze(ctx context.Context, frozen bool) error {
	var errs []error
	for _, n := range c.nodes() {
		errs = append(errs, n.cgroup.Freeze(ctx, frozen))
	}
	return errors.Join(errs...)
}

// Quiet stops kubelets, container runtimes and whatever else runs on the nodes beside the control plane, proxies and the pods that
// traffic runs between: together they use more of the machine than a visit may be disturbed by.
func (c *cluster) Quiet(ctx context.Context, quiet bool) error {
	parts := []string{initPart, systemPart}
	if !c.world.plan.Static {
		parts = append(parts, kubeletPart)
	}
	return c.freezeParts(ctx, quiet, parts...)
}

// freezeParts stops or resumes parts of all of the cluster's nodes.
func (c *cluster) freezeParts(ctx context.Context, frozen bool, parts ...string) error {
	for _, n := range c.nodes() {
		for _, name := range parts {
			part := &host.Cgroup{Dir: filepath.Join(n.cgroup.Dir, name)}
			if err := part.Freeze(ctx, frozen); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// Close deletes the cluster.
func (c *cluster) Close(ctx context.Context) error {
	// The engine cannot end what stands still, and nobody can look into it.
	errs := []error{c.freezeParts(ctx, false, initPart, systemPart, kubeletPart), c.freeze(ctx, false)}
	if c.world.plan.Retain {
		if c.last {
			c.world.report(c.world.howToEnter())
		}
		return errors.Join(errs...)
	}
	if c.etcd != nil {
		errs = append(errs, c.etcd.Close())
	}
	c.keepLogs(ctx)
	// Nothing on a node is worth the ten seconds that podman would give it to end by itself. Docker gives it none, and starts again what somebody
	// else ends.
	if c.world.engine.Kind == "podman" {
		settle, cancel := context.WithTimeout(ctx, host.SettleLimit)
		defer cancel()
		for _, n := range c.nodes() {
			errs = append(errs, n.cgroup.Kill(settle))
		}
	}
	errs = append(errs, deleteCluster(c.world.kind, c.name))
	for _, n := range c.nodes() {
		errs = append(errs, n.ns.Close())
	}
	if c.last {
		errs = append(errs, c.world.close(ctx))
	}
	return errors.Join(errs...)
}

// logLimit is how long a cluster that was thawed to be removed may take to hand out its logs.
const logLimit = 10 * time.Second

// keepLogs writes what tells of a lost pod into the run's folders, as far as it can be had: a cluster is removed without it too.
func (c *cluster) keepLogs(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, logLimit)
	defer cancel()
	for _, s := range c.sites {
		s.keepLog(ctx)
	}
	dir := filepath.Join(c.world.plan.Dir, c.name)
	for _, n := range c.nodes() {
		keep(ctx, n.kind, filepath.Join(dir, n.name+".log"), "journalctl", "--no-pager", "--output=short-iso", "--unit=kubelet", "--unit=containerd")
	}
	if c.control != nil {
		kubectl := []string{"kubectl", "--kubeconfig=/etc/kubernetes/admin.conf", "--request-timeout=5s", "get", "--all-namespaces"}
		keep(ctx, c.control.kind, filepath.Join(dir, "pods.log"), append(kubectl, "pods", "--output=wide")...)
		keep(ctx, c.control.kind, filepath.Join(dir, "events.log"), append(kubectl, "events", "--sort-by=.lastTimestamp")...)
	}
}

// keep writes what a command says on a node into a file.
func keep(ctx context.Context, on nodes.Node, path string, command ...string) {
	f, err := os.Create(path)
	if err != nil {
		return
	}
	defer f.Close()
	on.CommandContext(ctx, command[0], command[1:]...).SetStdout(f).SetStderr(f).Run()
}

// nodes are those that were found.
func (c *cluster) nodes() []*node {
	var all []*node
	if c.control != nil {
		all = append(all, c.control)
	}
	for _, s := range c.sites {
		if s.node != nil {
			all = append(all, s.node)
		}
	}
	return append(all, c.others...)
}

var _ clusters.Testable = (*cluster)(nil)

// controlKubeconfig is a kubeconfig file for who is in the network namespace of the control plane's node.
const controlKubeconfig = "kubeconfig-control"

func (c *cluster) Administrator() (kubeconfig, kubectl string) {
	return filepath.Join(c.world.plan.Dir, c.name, controlKubeconfig), fmt.Sprintf("/proc/%d/root/usr/bin/kubectl", c.control.pid)
}

// writeControlKubeconfig has the kubeconfig of kind, which reaches the API server through a port of the engine's, reach it where it listens.
func (c *cluster) writeControlKubeconfig(kubeconfig string) error {
	config, err := clientcmd.LoadFromFile(kubeconfig)
	if err != nil {
		return err
	}
	for _, entry := range config.Clusters {
		entry.Server = c.controlURL("6443")
	}
	file, _ := c.Administrator()
	return clientcmd.WriteToFile(*config, file)
}

func (c *cluster) Start(name string, argv, env []string, log string) (clusters.TestProcess, error) {
	group, err := c.world.run.Cgroup.Child(c.name + "-" + name)
	if err != nil {
		return nil, err
	}
	return c.world.run.Start(host.Command{Name: name, Argv: argv, Env: env, NetNS: c.control.ns, Cgroup: group, Log: log})
}

func (c *cluster) LoadImages(ctx context.Context, archive string, names map[string][]string) error {
	for _, n := range c.nodes() {
		if err := loadArchive(n.kind, archive); err != nil {
			return fmt.Errorf("load %s into %s: %w", archive, n.name, explain(err))
		}
		for image, others := range names {
			tag := append([]string{"--namespace=k8s.io", "images", "tag", "--force", image}, others...)
			if err := n.kind.CommandContext(ctx, "ctr", tag...).Run(); err != nil {
				return fmt.Errorf("name the image %s on %s: %w", image, n.name, explain(err))
			}
		}
	}
	return nil
}
