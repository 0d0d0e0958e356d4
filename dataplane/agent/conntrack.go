// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"
	proxyapi "k8s.io/kubernetes/pkg/proxy/apis/config"
	"k8s.io/kubernetes/pkg/proxy/conntrack"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// Conntrack are the settings of connection tracking that a node is to have where packets are translated, which kube-proxy makes, too. What is
// zero stays as the node has it.
type Conntrack struct {
	// MaxPerCore connections are tracked for each CPU, and Min at least (nf_conntrack_max).
	MaxPerCore, Min int32
	// TCPEstablished and TCPCloseWait are how long a TCP connection is remembered over which nothing is sent
	// (nf_conntrack_tcp_timeout_established, nf_conntrack_tcp_timeout_close_wait).
	TCPEstablished, TCPCloseWait time.Duration
	// TCPBeLiberal has packets out of the window be of their connection (nf_conntrack_tcp_be_liberal).
	TCPBeLiberal bool
	// UDP and UDPStream are the same of UDP, without answers and with (nf_conntrack_udp_timeout, nf_conntrack_udp_timeout_stream).
	UDP, UDPStream time.Duration
}

// DefaultConntrack are kube-proxy's own defaults. The kernel's are five days for an established connection; and a minute for one that one side
// has closed, after which the other, which may still send, is translated no more.
func DefaultConntrack() Conntrack {
	return Conntrack{MaxPerCore: 32 << 10, Min: 128 << 10, TCPEstablished: 24 * time.Hour, TCPCloseWait: time.Hour}
}

func (c Conntrack) validate() error {
	for _, period := range []time.Duration{c.TCPEstablished, c.TCPCloseWait, c.UDP, c.UDPStream} {
		if period < 0 || period > 0 && period < time.Second {
			return fmt.Errorf("agent: %v is none of conntrack's periods, which are seconds", period)
		}
	}
	if c.MaxPerCore < 0 || c.Min < 0 {
		return errors.New("agent: numbers of tracked connections are not negative")
	}
	return nil
}

// set makes the settings in a network namespace, by kube-proxy's own code.
func (c Conntrack) set(ctx context.Context, netNS string) error {
	err := lb.InNetNS(netNS, func() error {
		// The host's own network namespace alone may change how many connections are tracked, which is one number for all.
		most := &proxyapi.KubeProxyConntrackConfiguration{MaxPerCore: &c.MaxPerCore, Min: &c.Min}
		err := conntrack.SetSysctls(ctx, most)
		if slices.ContainsFunc([]error{fs.ErrPermission, fs.ErrNotExist, unix.EROFS, unix.EOPNOTSUPP}, func(refusal error) bool { return errors.Is(err, refusal) }) {
			klog.InfoS("The number of tracked connections stays as the node has it", "reason", err)
		} else if err != nil {
			return err
		}
		return conntrack.SetSysctls(ctx, &proxyapi.KubeProxyConntrackConfiguration{
			TCPEstablishedTimeout: &metav1.Duration{Duration: c.TCPEstablished}, TCPCloseWaitTimeout: &metav1.Duration{Duration: c.TCPCloseWait},
			TCPBeLiberal: c.TCPBeLiberal, UDPTimeout: metav1.Duration{Duration: c.UDP}, UDPStreamTimeout: metav1.Duration{Duration: c.UDPStream},
		})
	})
	if err != nil {
		return fmt.Errorf("agent: settings of connection tracking: %w", err)
	}
	return nil
}
