// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
	"sigs.k8s.io/yaml"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
)

// proxyHealth is where both kube-proxy and the agent answer inside their node.
const proxyHealth = "127.0.0.1:10256"

// startProxy starts what the node's spec asks for and returns when it is healthy, or has failed and Err says why.
func (n *node) startProxy(ctx context.Context, bin, kubeconfig string) error {
	if n.spec.ConntrackHooks {
		if err := clusters.InstallConntrackHooks(ctx, n.ns); err != nil {
			return fmt.Errorf("node %s: %w", n.spec.Name, err)
		}
	}
	var c host.Command
	var err error
	switch {
	case n.spec.KubeProxy != "":
		c, n.iptables, err = KubeProxyCommand(n.spec, n.dir, bin, kubeconfig)
	case n.spec.Agent:
		c, err = n.agentCommand(kubeconfig)
	default:
		return nil
	}
	if err != nil {
		return fmt.Errorf("node %s: %w", n.spec.Name, err)
	}
	if n.proxyGroup, err = n.cgroup.Child("proxy"); err != nil {
		return err
	}
	c.NetNS, c.Cgroup, c.Log = n.ns, n.proxyGroup, filepath.Join(n.dir, c.Name+".log")
	if n.proxy, err = n.run.Start(c); err != nil {
		return fmt.Errorf("node %s: %w", n.spec.Name, err)
	}
	if err := n.awaitHealthy(ctx); ctx.Err() != nil {
		return err
	} else if err != nil {
		n.giveUp(ctx, err)
	}
	return nil
}

// giveUp ends a proxy that has failed, so that the others have the host to themselves, and keeps the reason for Err.
func (n *node) giveUp(ctx context.Context, reason error) {
	n.mu.Lock()
	n.err = reason
	n.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, host.SettleLimit)
	defer cancel()
	if err := n.Stop(ctx); err != nil {
		n.mu.Lock()
		n.err = errors.Join(n.err, err)
		n.mu.Unlock()
	}
}

func (n *node) Stop(ctx context.Context) error {
	if n.proxy == nil {
		return nil
	}
	n.mu.Lock()
	if n.err == nil && !n.stopped {
		// It may have ended by itself before.
		n.err = n.proxy.Err()
	}
	n.stopped = true
	n.mu.Unlock()
	// The whole cgroup, because kube-proxy starts iptables commands. A frozen process dies too.
	if err := n.proxyGroup.Kill(ctx); err != nil {
		return fmt.Errorf("node %s: end %s: %w", n.spec.Name, n.proxy.Name, err)
	}
	select {
	case <-n.proxy.Done():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("node %s: wait for %s to end: %w", n.spec.Name, n.proxy.Name, context.Cause(ctx))
	}
}

func (n *node) Err() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.err != nil || n.stopped || n.proxy == nil {
		return n.err
	}
	return n.proxy.Err()
}

// KubeProxyCommand writes what a real kube-proxy needs into dir, which must be its own, and returns how to start it from the folder bin on a
// node as spec says, and the path of the iptables command that it uses, empty when spec names no backend. It serves its health at 127.0.0.1:10256
// and metrics at 127.0.0.1:10249 of its network namespace. The caller fills in the command's NetNS, Cgroup and Log.
func KubeProxyCommand(spec clusters.ProxySpec, dir, bin, kubeconfig string) (c host.Command, iptables string, err error) {
	path := filepath.Join(dir, "bin")
	if iptables, err = writeIPTables(spec.IPTables, dir, path); err != nil {
		return host.Command{}, "", err
	}
	zero := int32(0)
	config := v1alpha1.KubeProxyConfiguration{
		TypeMeta:           v1.TypeMeta{APIVersion: "kubeproxy.config.k8s.io/v1alpha1", Kind: "KubeProxyConfiguration"},
		HostnameOverride:   spec.Name,
		Mode:               v1alpha1.ProxyMode(spec.KubeProxy),
		ClusterCIDR:        strings.Join(podRanges(), ","),
		DetectLocalMode:    v1alpha1.LocalMode(localMode(spec)),
		DetectLocal:        v1alpha1.DetectLocalConfiguration{BridgeInterface: spec.PodInterfaces, InterfaceNamePrefix: spec.PodInterfaces},
		HealthzBindAddress: proxyHealth,
		MetricsBindAddress: "127.0.0.1:10249",
		// nf_conntrack_max belongs to the whole host and cannot be set from a node's namespace.
		Conntrack: v1alpha1.KubeProxyConntrackConfiguration{
			MaxPerCore: &zero, Min: &zero,
			TCPEstablishedTimeout: &v1.Duration{}, TCPCloseWaitTimeout: &v1.Duration{},
		},
	}
	config.IPTables.MasqueradeAll, config.NFTables.MasqueradeAll = spec.MasqueradeAll, spec.MasqueradeAll // the former is IPVS mode's, too
	config.ClientConnection.Kubeconfig = kubeconfig
	config.ClientConnection.ContentType = "application/vnd.kubernetes.protobuf"
	if p := spec.MinSyncPeriod; p != nil {
		config.IPTables.MinSyncPeriod.Duration = *p
		config.IPVS.MinSyncPeriod.Duration = *p
		config.NFTables.MinSyncPeriod.Duration = *p
	}
	b, err := yaml.Marshal(config)
	if err != nil {
		return host.Command{}, "", err
	}
	file := filepath.Join(dir, "kube-proxy.yaml")
	if err := os.WriteFile(file, b, 0o644); err != nil {
		return host.Command{}, "", fmt.Errorf("write kube-proxy's configuration: %w", err)
	}
	return host.Command{
		Name: "kube-proxy",
		Argv: []string{filepath.Join(bin, "kube-proxy"), "--config", file, "--v", "2"},
		Env:  append(os.Environ(), "PATH="+path+":"+os.Getenv("PATH")),
	}, iptables, nil
}

// writeIPTables fills the folder path with iptables commands that choose the backend and a lock in dir, the node's own, for kube-proxy's PATH and
// for those who read the rules. It returns the iptables command among them; without a backend there are none.
func writeIPTables(backend, dir, path string) (string, error) {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return "", err
	}
	if backend == "" {
		return "", nil
	}
	multi, err := exec.LookPath("xtables-" + backend + "-multi")
	if err != nil {
		return "", fmt.Errorf("%w; install the iptables package (plimsoll doctor --install)", err)
	}
	// Nodes must not wait for each other's, or the host's, lock.
	lock := filepath.Join(dir, "xtables.lock")
	for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"} {
		script := fmt.Sprintf("#!/bin/sh\nXTABLES_LOCKFILE='%s' exec '%s' %s \"$@\"\n", lock, multi, name)
		if err := os.WriteFile(filepath.Join(path, name), []byte(script), 0o755); err != nil {
			return "", err
		}
	}
	return filepath.Join(path, "iptables"), nil
}

// localMode is the spec's, or the lab's own choice.
func localMode(spec clusters.ProxySpec) string { return cmp.Or(spec.LocalMode, "ClusterCIDR") }

func (n *node) agentCommand(kubeconfig string) (host.Command, error) {
	argv := []string{n.program, "agent",
		"--kubeconfig", kubeconfig,
		"--hostname-override", n.spec.Name,
		"--healthz-bind-address", proxyHealth,
		"--metrics-bind-address", "127.0.0.1:10249",
	}
	if n.spec.Packets {
		argv = append(argv, "--sockets=false", "--devices", "*", "--cluster-cidr", strings.Join(podRanges(), ","), "--detect-local-mode", localMode(n.spec),
			"--pod-bridge-interface", n.spec.PodInterfaces, "--pod-interface-name-prefix", n.spec.PodInterfaces, "--masquerade-all="+strconv.FormatBool(n.spec.MasqueradeAll),
			"--conntrack-max-per-core", "0", "--conntrack-tcp-timeout-established", "0", "--conntrack-tcp-timeout-close-wait", "0") // as kube-proxy's
	} else {
		argv = append(argv, "--cgroup", n.cgroup.Dir)
	}
	if n.spec.PeerNames {
		argv = append(argv, "--peer-names")
	}
	if p := n.spec.MinSyncPeriod; p != nil {
		argv = append(argv, "--min-sync-period", p.String())
	}
	return host.Command{Name: "agent", Argv: argv}, nil
}

// healthyLimit is how long a proxy on a busy host may take from its start to its first sync; a quiet one takes a second.
const healthyLimit = 90 * time.Second

// awaitHealthy returns when the proxy's health check answers 200: it runs, and nothing has gone wrong so far. An error quotes
// the end of the proxy's log.
func (n *node) awaitHealthy(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, healthyLimit, fmt.Errorf("not within %v", healthyLimit))
	defer cancel()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	go func() {
		select {
		case <-n.proxy.Done():
			fail(n.proxy.Err())
		case <-ctx.Done():
		}
	}()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		return n.ns.DialContext(ctx, network, address)
	}}}
	err := host.Poll(ctx, n.proxy.Name+" to be healthy", func() (bool, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+proxyHealth+"/healthz", nil)
		if err != nil {
			return false, err
		}
		resp, err := client.Do(req)
		if err != nil {
			return false, err
		}
		defer resp.Body.Close()
		io.Copy(io.Discard, resp.Body)
		if resp.StatusCode != http.StatusOK {
			return false, fmt.Errorf("healthz answers %s", resp.Status)
		}
		return true, nil
	})
	if err != nil && n.proxy.Err() != nil {
		// How it ended says more than what its health check answered.
		return n.proxy.Err()
	}
	if err != nil {
		return fmt.Errorf("%w%s", err, host.LogTail(n.proxy.Log))
	}
	return nil
}
